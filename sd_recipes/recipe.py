"""The recipe: every setting of a run, with its help and its checks.

One flat pydantic model that inherits from small sections: users see flat names, and a function takes only the section
that it needs. A flag, a key of a recipe file and an attribute share one name.
This module imports neither torch nor diffusers, so that a mistake on the command line is reported at once.
"""

import itertools
import math
import re
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from sd_recipes.errors import nearest
from sd_recipes.optimizers import (
    EIGHT_BIT_ADAMW,
    OF_BITSANDBYTES,
    OPTIMIZERS,
    PRODIGY,
    SCHEDULE_FREE,
    check_kwargs,
    check_name,
    is_class,
    read_kwargs,
    read_param_groups,
    unread_flags,
)
from sd_recipes.redaction import LEFT_OUT, has_login, in_texts, redacted
from sd_recipes.sizes import bytes_of


def _number_from_text(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as text; the command line reads it as a number. Here both are numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _no_from_false(value: Any) -> Any:
    """YAML 1.1 reads a bare `no` as false."""
    return "no" if value is False else value


def _text_from_number(value: Any) -> Any:
    """YAML reads `0.05` and `100` as numbers, which this setting takes as words."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _number_or_auto(value: Any) -> Any:
    """The command line gives numbers as text here. Raises ValueError for what is neither."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value not in (None, "auto") and (type(value) is not int or value < 1):
        raise ValueError("give a number from 1, or auto")
    return value


def _list_from_text(value: Any) -> Any:
    """A recipe file may give a single name without brackets."""
    return [value] if isinstance(value, str) else value


def _check_no_password(text: str) -> str:
    if has_login(text):
        raise ValueError(
            "a user name or password in a URL is refused, because recipes are saved and shared: put it in ~/.netrc "
            "(https), in the environment (HF_TOKEN for the Hub, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3), "
            "or in fsspec's configuration (~/.config/fsspec)"
        )
    if LEFT_OUT in text:
        raise ValueError(f"{LEFT_OUT} stands for a secret that was not written down: give the whole value")
    return text


# Relative widths of averages of the weights. That of diffusers' warm-up, √(9/11)/10, to two digits; and that of the
# plain mean of all steps, which is the widest: see training/profiles.py.
DIFFUSERS_LENGTH, WIDEST_LENGTH = 0.09, 12**-0.5

Number = Annotated[float, BeforeValidator(_number_from_text)]
NumberOrAuto = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"] | None, BeforeValidator(_number_or_auto)]
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)

# What it means for a resumed run that a setting differs from the checkpoint's. `refused`: the state would not fit.
# `warned`: the run continues with the new value, and differs from the uninterrupted one. `compared`: what it stands for
# is compared (checkpoints/resume.py), since a folder may have moved, or several settings decide it together. `free`:
# the weights do not depend on it, except for rounding.
OnResume = Literal["refused", "warned", "compared", "free"]

# Samplers by short names: diffusers' classes that draw by a schedule of betas, from a seed.
SAMPLERS_BY_NAME = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver++_singlestep": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
OTHER_SAMPLER_NAMES = {
    "plms": "PNDMScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++_2m": "DPMSolverMultistepScheduler",
}


def sampler_class_name(name: str) -> str:
    """diffusers' class of a sampler that is given by a short name or the class's. Raises ValueError."""
    class_names = {each.lower(): each for each in SAMPLERS_BY_NAME.values()}
    known = SAMPLERS_BY_NAME | OTHER_SAMPLER_NAMES | class_names
    plain = re.sub(r"[ -]", "_", name.strip().lower())
    if plain not in known:
        raise ValueError(
            f"there is no such sampler for Stable Diffusion's noise schedule{nearest(plain, known)}: give one of "
            f"{', '.join(SAMPLERS_BY_NAME)}, or diffusers' class of one"
        )
    return known[plain]


def setting(default: Any, on_resume: OnResume, description: str, **constraints: Any) -> Any:
    """A field of a section: its default, what a change means for a resumed run, its help, and its range."""
    return Field(default, description=description, json_schema_extra={"on_resume": on_resume}, **constraints)


def on_resume(name: str) -> OnResume:
    """What a change of the setting `name` means for a resumed run."""
    extra = Recipe.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return cast(OnResume, extra["on_resume"])


def _also_called(settings: Any, name: str, other: str) -> Any:
    """Settings in which `other`, another script's name of the setting `name`, counts for it. Raises ValueError."""
    if not isinstance(settings, dict) or settings.get(other) is None:
        return settings
    if settings.get(name, settings[other]) not in (None, settings[other]):
        raise ValueError(
            redacted(f"--{other} {settings[other]} is another name of --{name}, which is {settings[name]}: drop one")
        )
    return {**{key: value for key, value in settings.items() if key != other}, name: settings[other]}


class Section(BaseModel):
    """Settings that belong together. A section's docstring is `Title: description.`, which help and docs show."""

    # A ValidationError would print the input, which may hold a password. Validators are built when one is first needed:
    # those of all sections took half of the time in which a mistake in a flag is answered.
    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
        defer_build=True,
    )

    @field_validator("*")
    @classmethod
    def hold_no_password(cls, value: Any) -> Any:
        """Refuse a password, which would be saved with the recipe. Raises ValueError."""
        in_texts(_check_no_password, value)
        return value


def heading(section: type[Section]) -> tuple[str, str]:
    """Title and description of a section."""
    title, _, description = (section.__doc__ or "").partition(": ")
    return title, description[:1].upper() + description[1:]


class RunConfig(Section):
    """Run and output: the recipe, the output folder, seed, precision and device."""

    config: str | None = setting(
        None, "free", "A YAML recipe: a path, or the name of a shipped one (quickstart, quickstart_lora)."
    )
    dry_run: bool = setting(
        False, "free", "Print the resolved recipe and a summary of the run, then exit; without a model, of the data."
    )
    output_dir: str = setting(
        "sd-model-finetuned",
        "free",
        "Where checkpoints, logs and the pipeline are written; a run that is already there is continued.",
    )
    overwrite: bool = setting(False, "free", "Remove the run in --output_dir and start over.")
    seed: int | None = setting(
        None, "warned", "Seed of all random draws; if not given, one is drawn and recorded.", ge=0, lt=2**63
    )
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, BeforeValidator(_no_from_false)] = setting(
        None, "warned", "Autocast type; if not given, accelerate's configuration decides."
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "free", "Where to train; `auto` leaves it to accelerate.")
    allow_tf32: bool = setting(False, "warned", "Use TF32 in matrix products and convolutions (Ampere GPUs and later).")
    profile_steps: int = setting(
        0,
        "free",
        "Profile this many steps, from the fourth on: a trace and a table by phase in OUTPUT_DIR/profile.",
        ge=0,
    )
    local_rank: int = setting(-1, "free", "Accepted for old launchers; LOCAL_RANK in the environment is used.")


class ModelConfig(Section):
    """Model: the pipeline that training starts from."""

    pretrained_model_name_or_path: str | None = setting(
        None,
        "compared",
        "A pipeline folder in diffusers format, a single file (.safetensors), a Hub id, or sd-recipes/tiny-emoji.",
    )
    vae: str | None = setting(
        None, "warned", "Another VAE than the model's: a file, a folder, or a Hub id, of a VAE or of a pipeline."
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None, "free", "Same as --vae, as diffusers' SDXL scripts call it."
    )
    base: str | None = setting(
        None,
        "warned",
        "The model whose parts fill in what --pretrained_model_name_or_path lacks, such as all but the UNet; a file "
        "takes its configuration from it, too.",
    )
    allow_pickle_weights: bool = setting(
        False, "free", "Read weights in .ckpt and .bin files too, without running code that they may hold."
    )
    revision: str | None = setting(None, "warned", "Branch, tag or commit of the Hub model.")
    variant: str | None = setting(None, "warned", "Variant of the weight files, such as fp16.")
    non_ema_revision: str | None = setting(
        None, "compared", "Revision of the UNet only (deprecated: use --variant non_ema)."
    )
    cache_dir: str | None = setting(None, "free", "Where downloads are cached.")
    clip_skip: int | None = setting(
        None,
        "refused",
        "Leave out so many of the text encoder's last layers, as diffusers counts: 1 is A1111's and sd-scripts' 2; of "
        "SDXL, so many before the last, which it never uses.",
        ge=1,
    )
    train_from_scratch: bool = setting(False, "compared", "Start from a UNet with random weights.")
    unet_config: str | None = setting(
        None, "compared", "JSON file with the UNet's configuration (needs --train_from_scratch)."
    )

    @model_validator(mode="before")
    @classmethod
    def name_the_vae(cls, settings: Any) -> Any:
        return _also_called(settings, "vae", "pretrained_vae_model_name_or_path")


class TextEncoderConfig(Section):
    """Text encoder: whether it is trained along with the UNet, how fast, and for how long."""

    train_text_encoder: bool = setting(False, "compared", "Train the text encoder too.")
    text_encoder_learning_rate: Number | None = setting(
        None, "warned", "Its learning rate, also with --lora_text_encoder; if not given, --learning_rate.", ge=0
    )
    text_encoder_steps: int | None = setting(
        None, "warned", "Freeze it after so many optimizer steps; if not given, never.", ge=1
    )


class LoraConfig(Section):
    """LoRA: small changes to the model that are trained in its place, a file of megabytes."""

    lora_rank: int | None = setting(None, "compared", "Train a LoRA of this rank; 4 to 64 are usual.", ge=1)
    lora_alpha: Number | None = setting(
        None, "compared", "Changes are scaled by this over the rank; if not given, the rank.", gt=0, allow_inf_nan=False
    )
    lora_dropout: Number = setting(0.0, "warned", "Dropout of the changes' input.", ge=0, lt=1)
    lora_targets: Annotated[list[str] | None, BeforeValidator(_list_from_text)] = setting(
        None,
        "compared",
        "The layers that are changed: `attention` (if not given), `all` in the blocks, or names such as attn2 or ff.",
        min_length=1,
    )
    lora_use_dora: bool = setting(False, "compared", "DoRA: train the length of each changed weight apart.")
    lora_text_encoder: bool = setting(False, "compared", "Change the text encoder too.")
    lora_weights: str | None = setting(
        None, "compared", "Start from this LoRA: a .safetensors file with diffusers' or kohya's keys, or its folder."
    )
    rank: int | None = setting(None, "free", "Same as --lora_rank, as diffusers' LoRA script calls it.", ge=1)

    @property
    def trains_lora(self) -> bool:
        """Whether a LoRA is trained, and not the model itself."""
        return self.lora_rank is not None or self.lora_weights is not None

    @property
    def product(self) -> str:
        """What the run leaves in its folder, in a word."""
        return "LoRA" if self.trains_lora else "pipeline"


class DataSource(Section):
    """One of several sources of rows, mixed by weight; the other fields are like the flags of the same names."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_data_dir: str | None = None
    train_split: str = "train"
    weight: Annotated[float, Field(gt=0), BeforeValidator(_number_from_text)] | Literal["rows"] = 1.0
    repeats: int = Field(1, ge=1)  # of every row in an epoch
    image_root: str | None = None
    caption_extension: str | None = None
    caption_column: str | None = None
    caption: str | None = None  # of pictures without one of their own
    is_reg: bool = False  # class pictures, for prior preservation

    @property
    def flag(self) -> str:
        """How messages name the source."""
        if self.dataset_name is not None:
            return f"--dataset_name {self.dataset_name}"
        return f"--train_data_dir {self.train_data_dir}"


class ClassSource(DataSource):
    """The folder that --class_data_dir names."""

    @property
    def flag(self) -> str:
        return f"--class_data_dir {self.train_data_dir}"


# Settings that say where rows come from, if data_sources do not; the first two name the place.
OF_ONE_SOURCE = (
    "dataset_name", "train_data_dir", "dataset_config_name", "dataset_revision", "train_split", "image_root",
)  # fmt: skip


class DataConfig(Section):
    """Data: where the rows come from, and what happens to those that cannot be used."""

    dataset_name: str | None = setting(
        None,
        "compared",
        "A Hub data set, a folder, a table (.csv, .tsv, .jsonl, .parquet), .arrow or .tar files (globs, braces and "
        "URLs too), or sd-recipes/emoji.",
    )
    dataset_config_name: str | None = setting(None, "compared", "Configuration of the data set, if it has several.")
    dataset_revision: str | None = setting(None, "compared", "Branch, tag or commit of the Hub data set.")
    train_data_dir: str | None = setting(
        None, "compared", "Folder of images, with captions in .txt files beside them, or in a metadata.jsonl or .csv."
    )
    train_split: str = setting("train", "compared", "Split of the data set to train on.")
    data_sources: list[DataSource] | None = setting(
        None, "compared", "Several sources mixed by weight, instead of --dataset_name; only in a recipe file."
    )
    dataset_config: str | None = setting(
        None,
        "free",
        "kohya's dataset.toml or .json, whose keys are read as settings; those without a counterpart are warned of.",
    )
    image_column: str = setting("image", "warned", "Column with the image, its path, or its bytes in base64.")
    image_root: str | None = setting(
        None, "compared", "Folder in which a table's relative paths begin; if not given, the table's own."
    )
    caption_extension: str | None = setting(
        None, "warned", "Suffix of the files beside the images that hold their captions: .txt, .caption or .json."
    )
    caption_lines: Literal["several", "one"] = setting(
        "several",
        "warned",
        "What lines of a caption file are: several captions, of which one is drawn, or one caption.",
    )
    caption_from: Literal["file", "folder"] | None = setting(
        None, "warned", "Take as caption the name of the image's file or folder."
    )
    folder_repeats: bool = setting(
        True,
        "compared",
        "Train images in a folder named like `10_cat` that often in every epoch, as kohya's scripts do.",
    )
    follow_links: bool = setting(False, "compared", "Follow links that lead out of the folder of images.")
    text_encoding: str | None = setting(
        None, "warned", "Encoding of tables and caption files that are neither UTF-8 nor marked, such as cp1252."
    )
    max_train_samples: int | None = setting(None, "warned", "Train on this many rows, drawn with the seed.", ge=1)
    streaming: bool = setting(False, "refused", "Stream the rows from the Hub, local files or a URL.")
    shuffle_block: int = setting(1000, "warned", "How many rows of a stream are shuffled together, per process.", ge=1)
    stream_outage_minutes: Number = setting(
        10.0, "free", "How long a stream may keep failing before the run gives up.", ge=0
    )
    check_data: Literal["full", "sample", "off"] = setting(
        "sample", "free", "Which rows to check before the model is loaded: all, a sample, or none."
    )
    max_bad_rows: int | None = setting(
        None, "free", "Stop when more rows than this are unusable; if not given, at 1 % of the rows.", ge=0
    )
    dataloader_num_workers: int | None = setting(
        None,
        "free",
        "Number of loader processes; 0 reads ahead in a thread. If not given, 0 on a CPU, and on a GPU one for each "
        "core of a training process, at most 8, for which shared memory has room.",
        ge=0,
    )


class ImageConfig(Section):
    """Images: how pictures are brought to the training size."""

    resolution: int = setting(512, "warned", "Width and height of the training images, in pixels.", ge=8)
    center_crop: bool = setting(False, "warned", "Crop the center instead of a random part; same as --crop center.")
    crop: Literal["random", "center", "none"] | None = setting(
        None, "warned", "Where to crop; `none` squeezes the whole image in, changing its aspect ratio."
    )
    random_flip: bool = setting(False, "warned", "Flip images left to right at random.")
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = setting("lanczos", "warned", "Filter for resizing.")
    max_image_megapixels: Number = setting(
        100.0, "warned", "Larger images are bad rows: a small file can decode to more memory than there is.", gt=0
    )
    aspect_ratio_buckets: bool = setting(
        False, "warned", "Train on several shapes of about --resolution² pixels, each image in the nearest one."
    )
    bucket_step: int = setting(64, "warned", "The sides of buckets are multiples of this many pixels.", ge=8)
    max_upscale: Number = setting(
        2.0, "warned", "With buckets, enlarge no image by more than this; smaller images get smaller buckets.", ge=1
    )

    @property
    def cropping(self) -> str:
        """`random`, `center` or `none`."""
        return self.crop or ("center" if self.center_crop else "random")


class MaskConfig(Section):
    """Masks: which parts of a picture are learned."""

    masked_loss: bool = setting(
        False,
        "warned",
        "Learn what is white in a picture's mask: of --mask_column, or a-mask.png beside a.png; pictures without one "
        "count as a whole.",
    )
    mask_column: str = setting("mask", "warned", "Column with the mask, its path, or its bytes in base64.")
    mask_from_alpha: bool = setting(
        False,
        "warned",
        "A picture's mask is its opacity, unless it has one of its own; switches --masked_loss on.",
    )
    unmasked_weight: Number = setting(
        0.0, "warned", "How much of the loss counts where a mask is black; where it is white, all of it.", ge=0, lt=1
    )

    @model_validator(mode="before")
    @classmethod
    def masks_are_switched_on(cls, settings: Any) -> Any:
        """`--mask_from_alpha` asks for `--masked_loss`."""
        if isinstance(settings, dict) and settings.get("mask_from_alpha") is True:
            return {**settings, "masked_loss": True}
        return settings

    @model_validator(mode="after")
    def masks_agree(self) -> "MaskConfig":
        if not self.masked_loss:
            for name in ("mask_column", "unmasked_weight"):
                if getattr(self, name) != MaskConfig.model_fields[name].default:
                    raise ValueError(f"--{name} is not read without --masked_loss: add it, or drop --{name}")
        return self


class PriorConfig(Section):
    """Prior preservation: pictures of a class beside the trained ones, so that it is kept."""

    class_data_dir: str | None = setting(
        None, "compared", "Folder of class pictures: one of them is trained beside every picture of the data."
    )
    class_prompt: str | None = setting(None, "warned", "Caption of the class pictures that have none of their own.")
    num_class_images: int | None = setting(
        None,
        "free",
        "Let the model draw class pictures by --class_prompt before the run, until --class_data_dir has so many.",
        ge=1,
    )
    prior_loss_weight: Number = setting(
        1.0, "warned", "Weight of a class picture's loss, where that of a trained one is 1.", gt=0, allow_inf_nan=False
    )
    prior_preservation: Literal["pictures", "model"] = setting(
        "pictures",
        "warned",
        "What class pictures teach: themselves, or what the model predicted of them before it was trained.",
    )

    @model_validator(mode="after")
    def class_pictures_agree(self) -> "PriorConfig":
        if self.class_data_dir is None:
            for name in ("class_prompt", "num_class_images"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} is of class pictures, and there is no folder for them: add --class_data_dir"
                    )
        if self.num_class_images is not None and self.class_prompt is None:
            raise ValueError(
                f"--num_class_images {self.num_class_images} are drawn by a caption: add --class_prompt, such as "
                "'a photo of a dog'"
            )
        return self


class CaptionConfig(Section):
    """Captions: which text goes with a picture, and what happens to missing and long captions."""

    caption_column: str = setting("text", "warned", "Column with the caption, or with a list of captions.")
    caption_columns: list[str] | None = setting(
        None, "warned", "Several caption columns instead; each sample draws one of them."
    )
    caption_template: str | None = setting(
        None, "warned", 'Caption made from columns, such as "a photo of {name}", instead of a caption column.'
    )
    caption_prefix: str | None = setting(None, "warned", "What comes before every caption, and a space.")
    caption_suffix: str | None = setting(None, "warned", "What comes after every caption and a space.")
    enable_wildcard: bool = setting(
        False, "warned", "Draw one of a, b and c for {a|b|c} in a caption, anew for every sample; {{ and }} are braces."
    )
    shuffle_tags: bool = setting(False, "warned", "Shuffle the parts of a caption, split at --tag_separator.")
    caption_tag_dropout_rate: Number = setting(
        0.0, "warned", "Fraction of a caption's parts that are left out, each by itself.", ge=0, le=1
    )
    keep_tags: int = setting(
        0,
        "warned",
        "With --shuffle_tags or --caption_tag_dropout_rate, leave this many leading parts in place.",
        ge=0,
    )
    tag_separator: str = setting(",", "warned", "What separates the tags of a caption.", min_length=1)
    keep_tokens_separator: str | None = setting(
        None,
        "warned",
        "A mark in captions, such as |||: tags before it, and after a second one, stay in place. Trained without it.",
        min_length=1,
    )
    secondary_separator: str | None = setting(
        None,
        "warned",
        "What joins tags that move and are left out together, such as ;;;. Trained as --tag_separator.",
        min_length=1,
    )
    caption_dropout: Number = setting(
        0.0, "warned", "Fraction of captions replaced by the empty one, for classifier-free guidance.", ge=0, le=1
    )
    caption_dropout_every_n_epochs: int = setting(
        0, "warned", "Train every so many epochs on the empty caption alone; 0: none of them.", ge=0
    )
    proportion_empty_prompts: Number | None = setting(
        None, "free", "Same as --caption_dropout, as diffusers' SDXL script calls it.", ge=0, le=1
    )
    blank_captions: Literal["skip", "empty", "error"] = setting(
        "skip",
        "warned",
        "Rows whose caption is missing or blank: skip them as bad, train on the empty caption, or stop.",
    )
    long_captions: Literal["error", "truncate", "chunk"] = setting(
        "truncate", "warned", "Captions over the tokenizer's limit: stop, truncate them, or encode them in chunks."
    )
    caption_chunks: int = setting(
        3, "warned", "With --long_captions chunk, the number of chunks per caption; longer ones are truncated.", ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def name_the_dropout(cls, settings: Any) -> Any:
        return _also_called(settings, "caption_dropout", "proportion_empty_prompts")


class CacheConfig(Section):
    """Caches: what is computed once and kept, instead of again in every epoch."""

    cache_latents: Literal["disk", "memory", "off"] = setting(
        "off", "warned", "Keep the VAE's moments: later epochs skip image decoding and the VAE. Needs a fixed crop."
    )
    latent_cache_dir: str | None = setting(
        None, "free", "Where the moments are kept, to share them between runs; if not given, in --output_dir."
    )
    latent_cache_dtype: Literal["fp16", "bf16"] = setting("fp16", "warned", "Precision of the kept moments.")
    cache_text: bool = setting(
        False, "warned", "Keep the captions' text states, up to 1 GiB; for captions that are few and do not change."
    )


class DataSettings(DataConfig, ImageConfig, MaskConfig, PriorConfig, CaptionConfig, CacheConfig):
    """The data settings that training and `inspect` share: where rows come from, and what is made of them."""

    @property
    def sources(self) -> list[DataSource]:
        """The sources to mix, a single one if it is given by flags; and after them those of class pictures."""
        sources = self.data_sources or [
            DataSource(
                dataset_name=self.dataset_name,
                dataset_config_name=self.dataset_config_name,
                dataset_revision=self.dataset_revision,
                train_data_dir=self.train_data_dir,
                train_split=self.train_split,
                image_root=self.image_root,
                caption_extension=self.caption_extension,
            )
        ]
        if self.class_data_dir is not None:
            own = ClassSource(train_data_dir=self.class_data_dir, caption=self.class_prompt, is_reg=True)
            sources = [*sources, own]
        return sorted(sources, key=lambda source: source.is_reg)

    @property
    def trained_sources(self) -> list[DataSource]:
        """The sources but for those of class pictures."""
        return [source for source in self.sources if not source.is_reg]

    @property
    def has_class_pictures(self) -> bool:
        return len(self.trained_sources) < len(self.sources)

    @model_validator(mode="after")
    def settings_agree(self) -> "DataSettings":
        if self.data_sources is not None:
            if self.dataset_name or self.train_data_dir:
                raise ValueError(
                    "data_sources of the recipe file contradict --dataset_name and --train_data_dir: drop one"
                )
            if not self.data_sources:
                raise ValueError("data_sources of the recipe file is empty: name a dataset_name or a train_data_dir")
            for name in OF_ONE_SOURCE[2:]:
                # A resolved recipe names them too, at their defaults.
                if getattr(self, name) != DataConfig.model_fields[name].default:
                    raise ValueError(
                        f"--{name} {getattr(self, name)} is not read with data_sources of the recipe file: set it "
                        "in the sources that it is meant for"
                    )
        if any(source.dataset_name is None and source.train_data_dir is None for source in self.sources):
            raise ValueError("no data: give --train_data_dir FOLDER or --dataset_name NAME")
        for source in self.sources:
            if source.dataset_name is None and source.dataset_revision is not None:
                raise ValueError(f"{source.flag} has no revisions: drop --dataset_revision")
        if not self.trained_sources:
            raise ValueError(
                "all data_sources hold class pictures (is_reg), and there is none that they could come beside: add one"
            )
        if len({source.weight == "rows" for source in self.trained_sources}) > 1:
            raise ValueError(
                "data_sources of the recipe file give some a weight and some `rows`: give all of them one or the other"
            )
        if self.caption_from and (self.caption_template or self.caption_columns):
            raise ValueError("--caption_from says what the caption is: drop --caption_template and --caption_columns")
        if self.center_crop and self.crop not in (None, "center"):
            raise ValueError(f"--center_crop contradicts --crop {self.crop}: drop one")
        if self.caption_columns and self.caption_template:
            raise ValueError("--caption_columns and --caption_template both say what the caption is: drop one")
        if self.keep_tags and not (self.shuffle_tags or self.caption_tag_dropout_rate):
            raise ValueError(
                "--keep_tags needs --shuffle_tags or --caption_tag_dropout_rate: add one, or drop --keep_tags"
            )
        names = ("tag_separator", "keep_tokens_separator", "secondary_separator")
        separators = {name: value for name in names if (value := getattr(self, name)) is not None}
        for one, other in itertools.permutations(separators, 2):
            if separators[one] in separators[other]:
                raise ValueError(
                    f"--{other} {separators[other]!r} holds --{one} {separators[one]!r}, so that captions could be "
                    "read in two ways: choose another"
                )
        for source in self.sources:
            if source.is_reg and source.weight not in (1.0, "rows"):
                raise ValueError(
                    f"the weight {source.weight:g} of {source.flag} is not read, since one of its class pictures comes "
                    "beside every trained one: use --prior_loss_weight"
                )
        if not self.has_class_pictures:
            for name in ("prior_loss_weight", "prior_preservation"):
                if (value := getattr(self, name)) != PriorConfig.model_fields[name].default:
                    raise ValueError(
                        f"--{name} {value} is of class pictures, and there are none: add --class_data_dir, or drop it"
                    )
        elif self.streaming:
            raise ValueError(
                "class pictures (--class_data_dir, is_reg) come beside known rows, which a stream has not: drop "
                "--streaming"
            )
        if self.streaming and len(self.sources) > 1 and self.sources[0].weight == "rows":
            raise ValueError(
                "the weight `rows` in data_sources, which kohya's dataset.toml gives, needs their numbers, and streams "
                "do not know them: drop --streaming, or give weights in a recipe"
            )
        if self.streaming and any(source.repeats > 1 for source in self.sources):
            raise ValueError(
                "`repeats` in data_sources, num_repeats of kohya's dataset.toml, repeats known rows, which a stream "
                "has not: drop --streaming, or the repeats"
            )
        if self.streaming and len(self.sources) > 1 and self.caption_dropout_every_n_epochs:
            raise ValueError(
                "--caption_dropout_every_n_epochs counts epochs, and several streams have no common one that ends: use "
                "--caption_dropout, or drop --streaming"
            )
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                "--max_train_samples draws from all rows, which a stream does not know: drop it, or drop --streaming"
            )
        if self.cache_latents != "off" and self.cropping == "random":
            raise ValueError(
                "--cache_latents keeps one crop of an image, and the crop is random: add --center_crop or --crop none"
            )
        return self


ENDS = ("earlier", "later")  # of a model's timesteps


class ObjectiveConfig(Section):
    """Objective: what the UNet learns to predict, and how noise and errors are weighted."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "score"] | None = setting(
        None, "compared", "What the UNet predicts; if not given, what the model's scheduler says."
    )
    rescale_betas_zero_snr: bool = setting(
        False,
        "warned",
        "Let the last timestep be pure noise, in training and in the exported scheduler; not for epsilon and score.",
    )
    snr_gamma: Number | None = setting(None, "warned", "Min-SNR weighting; 5.0 is recommended.", gt=0)
    soft_snr_gamma: Number | None = setting(
        None, "warned", "Min-SNR weighting in its soft form, without a kink; 5.0 is usual.", gt=0, allow_inf_nan=False
    )
    debiased_estimation_loss: bool = setting(False, "warned", "Debiased estimation: the loss of epsilon over √SNR.")
    p2_gamma: Number | None = setting(
        None,
        "warned",
        "P2 weighting: the loss of epsilon over (k + SNR)^γ; 1.0 is recommended.",
        gt=0,
        allow_inf_nan=False,
    )
    p2_k: Number = setting(1.0, "warned", "P2's k.", gt=0, allow_inf_nan=False)
    learned_uncertainty: bool = setting(
        False, "refused", "Divide the loss by its learned size e^u at every timestep, which uncertainty.png shows."
    )
    loss_type: Literal["l2", "huber", "smooth_l1"] = setting(
        "l2",
        "warned",
        "What is averaged over a latent: squared errors, or pseudo-Huber losses, which outliers move less.",
    )
    huber_c: Number = setting(
        0.1, "warned", "Errors beyond this count linearly; with a schedule, its parameter.", gt=0, allow_inf_nan=False
    )
    huber_schedule: Literal["snr", "exponential", "constant"] = setting(
        "snr", "warned", "How Huber's c depends on the timestep."
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = setting(
        "uniform", "warned", "How timesteps are distributed; stratified over the global batch in any case."
    )
    logit_mean: Number = setting(
        0.0, "warned", "Mean of the logit-normal's normal; above 0 draws more noisy ones.", allow_inf_nan=False
    )
    logit_std: Number = setting(
        1.0, "warned", "Standard deviation of the logit-normal's normal.", gt=0, allow_inf_nan=False
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = setting(
        "none",
        "warned",
        "Draw some timesteps more often: the first ones, the last (noisiest) ones, or a range of them.",
    )
    timestep_bias_multiplier: Number = setting(
        1.0, "warned", "How many times as often they are drawn.", gt=0, allow_inf_nan=False
    )
    timestep_bias_portion: Number = setting(
        0.25, "warned", "Which share of all timesteps they are, if they are the earlier or the later ones.", gt=0, le=1
    )
    timestep_bias_begin: int = setting(0, "warned", "Where the range of them begins.", ge=0)
    timestep_bias_end: int = setting(1000, "warned", "Where that range ends, itself not in it.", ge=1)
    min_timestep: int = setting(0, "warned", "The first timestep that is trained.", ge=0)
    max_timestep: int | None = setting(
        None, "warned", "Where the trained timesteps end, itself not among them; if not given, at the last one.", ge=1
    )
    timesteps_by_error: bool = setting(
        False,
        "refused",
        "Draw more timesteps where the running error is large, with weights that keep the loss unbiased.",
    )
    noise_offset: Number = setting(0.0, "warned", "Scale of added noise that is constant over each channel.", ge=0)
    multires_noise_iterations: int = setting(
        0, "warned", "Pyramid noise: levels of coarser noise to add; 6 is usual.", ge=0
    )
    multires_noise_discount: Number = setting(
        0.3, "warned", "Pyramid noise: scale of each level against the one before it.", gt=0, le=1, allow_inf_nan=False
    )
    input_perturbation: Number = setting(0.0, "warned", "Scale of extra noise on the input; 0.1 is recommended.", ge=0)
    dream_training: bool = setting(False, "warned", "DREAM: a second forward pass rectifies noise and target.")
    dream_detail_preservation: Number = setting(1.0, "warned", "DREAM's exponent p.", ge=0)

    @property
    def weightings(self) -> list[str]:
        """Names of the settings that ask for a weight by timestep."""
        names = ("snr_gamma", "soft_snr_gamma", "debiased_estimation_loss", "p2_gamma", "learned_uncertainty")
        return [name for name in names if getattr(self, name)]

    @model_validator(mode="after")
    def objective_agrees(self) -> "ObjectiveConfig":
        if len(self.weightings) > 1:
            raise ValueError(
                f"{' and '.join(f'--{name}' for name in self.weightings)} all say how timesteps are weighted: keep one"
            )
        if self.rescale_betas_zero_snr and self.prediction_type in ("epsilon", "score"):
            raise ValueError(
                f"--rescale_betas_zero_snr makes the last timestep pure noise, of which {self.prediction_type} tells "
                "nothing: use --prediction_type v_prediction, or drop it"
            )
        if self.dream_training and self.prediction_type not in (None, "epsilon"):
            raise ValueError(
                f"--dream_training is defined for the prediction type epsilon, not for {self.prediction_type}: drop one"
            )
        if self.timesteps_by_error and self.timestep_sampling != "uniform":
            raise ValueError(
                f"--timesteps_by_error and --timestep_sampling {self.timestep_sampling} both say which timesteps are "
                "drawn: drop one"
            )
        if self.timestep_bias_strategy != "none" and (self.timesteps_by_error or self.timestep_sampling != "uniform"):
            other = "timesteps_by_error" if self.timesteps_by_error else f"timestep_sampling {self.timestep_sampling}"
            raise ValueError(
                f"--timestep_bias_strategy {self.timestep_bias_strategy} and --{other} both say which timesteps are "
                "drawn: drop one"
            )
        if self.timestep_bias_strategy == "range" and self.timestep_bias_end <= self.timestep_bias_begin:
            raise ValueError(
                f"--timestep_bias_begin {self.timestep_bias_begin} leaves no timestep before --timestep_bias_end "
                f"{self.timestep_bias_end}: lower one or raise the other"
            )
        if self.timesteps_by_error and self.learned_uncertainty:
            raise ValueError(
                "--learned_uncertainty makes the loss alike at all timesteps, so that --timesteps_by_error has nothing "
                "to go by: drop one"
            )
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(
                f"--min_timestep {self.min_timestep} leaves no timestep before --max_timestep {self.max_timestep}: "
                "lower one or raise the other"
            )
        for name, needs, is_read in (
            ("p2_k", "--p2_gamma 1", self.p2_gamma is not None),
            ("huber_c", "--loss_type huber", self.loss_type != "l2"),
            ("huber_schedule", "--loss_type huber", self.loss_type != "l2"),
            ("logit_mean", "--timestep_sampling logit_normal", self.timestep_sampling == "logit_normal"),
            ("logit_std", "--timestep_sampling logit_normal", self.timestep_sampling == "logit_normal"),
            ("timestep_bias_multiplier", "--timestep_bias_strategy later", self.timestep_bias_strategy != "none"),
            ("timestep_bias_portion", "--timestep_bias_strategy later", self.timestep_bias_strategy in ENDS),
            ("timestep_bias_begin", "--timestep_bias_strategy range", self.timestep_bias_strategy == "range"),
            ("timestep_bias_end", "--timestep_bias_strategy range", self.timestep_bias_strategy == "range"),
            ("multires_noise_discount", "--multires_noise_iterations 6", self.multires_noise_iterations > 0),
        ):
            value = getattr(self, name)
            if not is_read and value != type(self).model_fields[name].default:
                raise ValueError(f"--{name} {value} is not read without {needs}: add it, or drop --{name}")
        return self


class ParamGroup(Section):
    """Parameters with a learning rate of their own: those whose PART.NAME in a checkpoint matches the pattern."""

    pattern: str = Field(min_length=1)
    learning_rate: Number = Field(ge=0, allow_inf_nan=False)


class OptimConfig(Section):
    """Optimization: batch size, steps, optimizer, learning rate and averaged weights."""

    train_batch_size: int = setting(16, "compared", "Images per device and micro-batch.", ge=1)
    gradient_accumulation_steps: int = setting(1, "compared", "Micro-batches per optimizer step.", ge=1)
    num_train_epochs: int = setting(100, "compared", "Passes over the data.", ge=1)
    max_train_steps: int | None = setting(None, "compared", "Optimizer steps; overrides --num_train_epochs.", ge=1)
    optimizer: Annotated[str, AfterValidator(check_name)] = setting(
        "adamw",
        "refused",
        f"{', '.join(OPTIMIZERS)}, or a class of an installed package, such as torch.optim.RAdam (docs/optimizers.md).",
        examples=[*OPTIMIZERS],
    )
    optimizer_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(read_kwargs), AfterValidator(check_kwargs)] = (
        setting(
            None,
            "refused",
            "Settings of the optimizer itself, as its class calls them: d_coef=0.5 betas=0.9,0.99. They take the place "
            "of what other flags say.",
        )
    )
    param_groups: Annotated[list[ParamGroup] | None, BeforeValidator(read_param_groups)] = setting(
        None,
        "warned",
        "Learning rates of parameters by their names: '*.attn2.*=1e-5'. The first pattern that matches a name counts; "
        "with rate 0 the parameters are frozen.",
    )
    use_8bit_adam: bool = setting(False, "free", "Same as --optimizer adamw8bit (bitsandbytes).")
    learning_rate: Number = setting(
        1e-4, "warned", "Learning rate after the warm-up; 1, if not given, for --optimizer prodigy.", ge=0
    )
    scale_lr: bool = setting(False, "warned", "Multiply the learning rate by the global batch size.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = setting("constant", "compared", "Learning-rate schedule, in optimizer steps.")
    lr_warmup_steps: int = setting(500, "warned", "Optimizer steps of warm-up.", ge=0)
    adam_beta1: Number = setting(0.9, "warned", "AdamW's first decay rate.", ge=0, lt=1)
    adam_beta2: Number = setting(0.999, "warned", "AdamW's second decay rate.", ge=0, lt=1)
    adam_weight_decay: Number = setting(1e-2, "warned", "Weight decay, for every optimizer.", ge=0)
    adam_epsilon: Number = setting(1e-8, "warned", "AdamW's epsilon.", gt=0)
    sgd_momentum: Number = setting(0.9, "warned", "SGD's momentum.", ge=0, lt=1)
    max_grad_norm: Number = setting(1.0, "warned", "Gradients are clipped to this norm; 0: not at all.", ge=0)
    max_skipped_steps: int = setting(
        5,
        "free",
        "Stop when this many steps in a row had a gradient that is not finite, and were skipped; 0 or 1: at the first.",
        ge=0,
    )
    use_ema: bool = setting(False, "warned", "Keep an exponential moving average of the weights, and export it.")
    ema_length: Number = setting(
        DIFFUSERS_LENGTH,
        "warned",
        "Relative width of the average: the part of the run that it looks back on; 0.09 is as in diffusers.",
        gt=0,
        lt=WIDEST_LENGTH,
    )
    ema_decay: Number = setting(
        0.9999, "warned", "Maximum decay of the average; only with the default --ema_length.", ge=0, lt=1
    )
    ema_snapshots: bool = setting(
        False,
        "warned",
        "Keep two averages at every checkpoint, of which `sd-recipes average` makes those of any length.",
    )
    offload_ema: bool = setting(
        False, "free", "Keep the average in host memory; it visits the GPU in pieces, beside the next step."
    )
    foreach_ema: bool = setting(False, "free", "Accepted; the average is always updated with foreach operations.")

    @property
    def needs_contiguous_weights(self) -> bool:
        """Whether the optimizer makes weights contiguous, as bitsandbytes' do, or may take it for granted."""
        return self.optimizer in OF_BITSANDBYTES or is_class(self.optimizer)

    @model_validator(mode="before")
    @classmethod
    def name_the_rate(cls, settings: Any) -> Any:
        """Prodigy finds the learning rate, of which its own is a factor."""
        if isinstance(settings, dict) and settings.get("optimizer") == PRODIGY:
            return {"learning_rate": 1.0, **settings}
        return settings

    @model_validator(mode="after")
    def optimizer_agrees(self) -> "OptimConfig":
        for name in unread_flags(self.optimizer):
            value = getattr(self, name)
            if value != OptimConfig.model_fields[name].default:
                raise ValueError(
                    f"--{name} {value} is not read by --optimizer {self.optimizer}: drop it, or use --optimizer_kwargs"
                )
        if self.optimizer == SCHEDULE_FREE and (self.use_ema or self.ema_snapshots):
            raise ValueError(
                f"{'--use_ema' if self.use_ema else '--ema_snapshots'} averages the weights, which --optimizer "
                f"{SCHEDULE_FREE} does by itself: drop one"
            )
        if self.optimizer == PRODIGY and self.scale_lr:
            raise ValueError(f"--scale_lr multiplies a learning rate, which --optimizer {PRODIGY} finds: drop one")
        return self


class MemoryConfig(Section):
    """Memory and speed: what trades one for the other."""

    gradient_checkpointing: bool = setting(False, "warned", "Recompute activations: less memory, slower.")
    gradient_checkpointing_blocks: list[str] | None = setting(
        None,
        "warned",
        "Recompute only those of some of the UNet's blocks: down, mid, up, or one of them, such as down.0 and up.3, "
        "whose activations are the largest.",
        min_length=1,
    )
    weights_dtype: Literal["float32", "bf16"] = setting(
        "float32",
        "warned",
        "Type of the trained UNet's weights and gradients; bf16 is rounded stochastically, and needs --mixed_precision "
        "bf16.",
    )
    fused_backward_pass: bool = setting(
        False,
        "warned",
        "Step each parameter inside the backward pass, which frees its gradient; needs --max_grad_norm 0.",
    )
    vae_slicing: bool = setting(False, "warned", "Let the VAE encode images one by one.")
    vae_tiling: bool = setting(
        False, "warned", "Let the VAE encode and decode large images in overlapping tiles, whose seams are blended."
    )
    enable_xformers_memory_efficient_attention: bool = setting(
        False, "warned", "Use xFormers' attention; where it is not installed, PyTorch's own, with a warning."
    )
    channels_last: Literal["auto", "always", "never"] = setting(
        "auto", "warned", "Memory format of UNet and VAE; auto: channels last, except for float32 on a GPU."
    )
    cudnn_benchmark: bool = setting(
        False,
        "warned",
        "Let cuDNN time its convolutions for each shape and take the fastest, which may be another one in the next "
        "run: what is repeated or resumed then is the same up to rounding.",
    )
    compile: Literal["blocks", "unet", "graphs"] | None = setting(
        None,
        "warned",
        "Compile the UNet with torch.compile: its blocks, the whole of it, or the whole of it as CUDA graphs "
        "(docs/gpu.md).",
    )
    compile_unet: bool = setting(False, "free", "Same as --compile unet.")
    memory: str | None = setting(
        None,
        "free",
        "The memory that the run may take, such as 12GB: micro-batch, precision, checkpointing, 8-bit AdamW and the "
        "average's place are chosen so that it fits, and the batch that is optimized stays (docs/memory.md).",
    )
    micro_batch: NumberOrAuto = setting(
        None,
        "free",
        "How many images a device takes at once: larger batches are divided, with the same result up to rounding. If "
        "not given, --train_batch_size. Halved when memory runs out; `auto` tries more again later.",
    )

    @field_validator("memory")
    @classmethod
    def memory_is_a_size(cls, memory: str | None) -> str | None:
        if memory is not None:
            bytes_of(memory)
        return memory


class CheckpointConfig(Section):
    """Checkpoints: how often a run's state is saved, and which checkpoint it resumes from."""

    checkpointing_steps: int = setting(500, "free", "Optimizer steps between checkpoints.", ge=1)
    checkpointing_minutes: Number | None = setting(
        None, "free", "Also save when the last checkpoint is this many minutes old.", gt=0
    )
    checkpoints_total_limit: int | None = setting(None, "free", "Keep only this many of the newest checkpoints.", ge=1)
    ema_snapshots_limit: int | None = setting(
        None, "free", "With --ema_snapshots, keep those of this many checkpoints, evenly spaced.", ge=2
    )
    resume_from_checkpoint: str | None = setting(
        None, "free", "`latest`, the default if --output_dir holds a run, or a checkpoint's name or path."
    )


class ValidationConfig(Section):
    """Validation and tracking: what is drawn and measured during training, and where the numbers go."""

    validation_prompts: list[str] | None = setting(None, "free", "Prompts to draw pictures of at every validation.")
    validation_epochs: int = setting(5, "free", "Epochs between validations.", ge=1)
    validation_steps: int | None = setting(None, "free", "Steps between validations, instead of epochs.", ge=1)
    validation_split: Annotated[str | None, BeforeValidator(_text_from_number)] = setting(
        None,
        "compared",
        "What is held out of training: a split, a folder or file of other rows, a share of the rows (0.05), or a "
        "number of first rows (100).",
    )
    validation_rows: int = setting(
        256, "warned", "Look at no more held-out rows than this, and at as many training rows.", ge=1
    )
    validation_samples: int = setting(
        256, "warned", "Measure at least so many errors of each: few rows are looked at under several noises.", ge=1
    )
    validation_pictures: int = setting(
        4, "free", "Without --validation_prompts, draw the captions of this many held-out rows.", ge=0
    )
    keep_best: bool = setting(
        True, "free", "Keep the weights with the lowest held-out loss so far, one copy, in OUTPUT_DIR/best."
    )
    early_stopping: int | None = setting(
        None, "free", "Stop after this many validations without a lower held-out loss.", ge=1
    )
    export: Literal["end", "best"] = setting(
        "end",
        "free",
        "Which weights the pipeline gets: those of the last step, or those with the lowest held-out loss.",
    )
    validate_before_training: bool = setting(False, "free", "Validate at step 0 too, and write before_after.png.")
    validation_inference_steps: int = setting(20, "free", "Denoising steps of a validation picture.", ge=1)
    validation_sampler: str | None = setting(
        None,
        "free",
        "Sampler of validation pictures: ddim, euler_a, dpmsolver++, … or diffusers' class; if not given, "
        "the pipeline's own.",
    )
    validation_guidance_scale: Number = setting(7.5, "free", "Guidance scale of a validation picture.", ge=0)
    validation_clip_model: str | None = setting(
        None,
        "free",
        "CLIP model for the image-text score of validation pictures (folder, Hub id, or sd-recipes/tiny-clip).",
    )
    logging_dir: str = setting("logs", "free", "TensorBoard folder, inside --output_dir.")
    logging_steps: int = setting(10, "free", "Steps between logs.", ge=1)
    report_to: str = setting("tensorboard", "free", "tensorboard, wandb, comet_ml, all or none.")
    tracker_project_name: str = setting("text2image-fine-tune", "free", "Name of the run in the trackers.")

    @field_validator("validation_sampler")
    @classmethod
    def sampler_is_known(cls, name: str | None) -> str | None:
        if name is not None:
            sampler_class_name(name)
        return name

    @property
    def held_out_share(self) -> float | None:
        """The share of the rows that is held out, if --validation_split says one."""
        text = self.validation_split or ""
        return float(text) if NUMBER.fullmatch(text) and not text.isdigit() else None

    @property
    def held_out_first(self) -> int | None:
        """The number of first rows that are held out, if --validation_split says one."""
        text = self.validation_split or ""
        return int(text) if text.isdigit() else None

    @property
    def draws_pictures(self) -> bool:
        """Whether validations draw pictures, of prompts or of captions."""
        return bool(self.validation_prompts or (self.validation_split and self.validation_pictures))

    @property
    def divides_rows(self) -> bool:
        """Whether what is held out is a part of the rows that would otherwise be trained on."""
        return self.held_out_share is not None or self.held_out_first is not None

    @model_validator(mode="after")
    def validation_agrees(self) -> "ValidationConfig":
        share, first = self.held_out_share, self.held_out_first
        if found := re.fullmatch(r"([\d.]+) ?%", self.validation_split or ""):
            raise ValueError(
                f"--validation_split {self.validation_split} is a share in percent: write {float(found[1]) / 100:g}"
            )
        if (share is not None and not 0 < share < 1) or first == 0:
            raise ValueError(
                f"--validation_split {self.validation_split} leaves nothing on one side: give a share between 0 and 1, "
                "such as 0.05, a number of first rows, a split, or a folder"
            )
        if self.validation_split is None:
            for name in ("early_stopping", "export"):
                if (value := getattr(self, name)) not in (None, "end"):
                    raise ValueError(
                        f"--{name} {value} goes by the held-out loss: give --validation_split, such as 0.05, or drop it"
                    )
        if self.export == "best" and not self.keep_best:
            raise ValueError("--export best needs the weights that --keep_best keeps: drop --no-keep_best")
        return self


class HubConfig(Section):
    """Hub: publishing the pipeline on the Hugging Face Hub."""

    push_to_hub: bool = setting(False, "free", "Upload the pipeline at the end.")
    hub_model_id: str | None = setting(None, "free", "Repository to push to; if not given, the output folder's name.")
    hub_token: str | None = setting(None, "free", "Refused: it would end up in logs. Use `hf auth login` or HF_TOKEN.")


ONLY_IN_FILES = {"data_sources"}  # settings that have no flag
SECTIONS: tuple[type[Section], ...] = (
    RunConfig, ModelConfig, TextEncoderConfig, LoraConfig, DataConfig, ImageConfig, MaskConfig, PriorConfig,
    CaptionConfig, CacheConfig, ObjectiveConfig, OptimConfig, MemoryConfig, CheckpointConfig, ValidationConfig,
    HubConfig,
)  # fmt: skip


class Recipe(
    RunConfig, ModelConfig, TextEncoderConfig, LoraConfig, DataSettings, ObjectiveConfig, OptimConfig, MemoryConfig,
    CheckpointConfig, ValidationConfig, HubConfig,
):  # fmt: skip
    """All settings of a run, frozen. Raises pydantic's ValidationError, which `load_recipe` turns into RecipeError."""

    model_config = ConfigDict(frozen=True)

    @property
    def images_at_once(self) -> int:
        """How many images a device takes at once, as long as there is memory for them."""
        given = self.micro_batch if isinstance(self.micro_batch, int) else self.train_batch_size
        return min(given, self.train_batch_size)

    @model_validator(mode="before")
    @classmethod
    def name_the_optimizer(cls, settings: Any) -> Any:
        """`--use_8bit_adam` is another way to say `--optimizer adamw8bit`."""
        if isinstance(settings, dict) and settings.get("use_8bit_adam") is True:
            return {
                **settings,
                "optimizer": {"adamw": "adamw8bit"}.get(name := settings.get("optimizer", "adamw"), name),
            }
        return settings

    @model_validator(mode="before")
    @classmethod
    def name_what_is_compiled(cls, settings: Any) -> Any:
        """`--compile_unet` is another way to say `--compile unet`."""
        if isinstance(settings, dict) and settings.get("compile_unet") is True and settings.get("compile") is None:
            return {**settings, "compile": "unet"}
        return settings

    @model_validator(mode="before")
    @classmethod
    def name_the_rank(cls, settings: Any) -> Any:
        """`--rank` is another way to say `--lora_rank`."""
        if isinstance(settings, dict) and settings.get("rank") is not None and settings.get("lora_rank") is None:
            return {**settings, "lora_rank": settings["rank"]}
        return settings

    @model_validator(mode="after")
    def lora_agrees(self) -> "Recipe":
        if self.rank not in (None, self.lora_rank):
            raise ValueError(f"--rank {self.rank} contradicts --lora_rank {self.lora_rank}: drop one of them")
        for name, field in LoraConfig.model_fields.items():
            value = getattr(self, name)
            if value != field.default and not self.trains_lora:
                raise ValueError(
                    f"{redacted(_as_flag(name, value))} is not read without --lora_rank: add --lora_rank 8, or drop it"
                )
        if self.lora_weights is not None:
            for name in ("lora_targets", "lora_use_dora"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{_as_flag(name, value)} contradicts --lora_weights, which says so by itself: drop it"
                    )
        if self.trains_lora and self.train_from_scratch:
            flag = "--lora_rank" if self.lora_weights is None else "--lora_weights"
            raise ValueError(
                f"{flag} changes a trained UNet, and --train_from_scratch has none: drop --train_from_scratch, or "
                f"train the UNet whole, without {flag}"
            )
        return self

    @model_validator(mode="after")
    def text_encoder_agrees(self) -> "Recipe":
        if self.train_text_encoder and self.trains_lora:
            raise ValueError(
                "--train_text_encoder trains the whole text encoder, which a LoRA's file cannot hold: use "
                "--lora_text_encoder, or drop the LoRA"
            )
        is_trained = self.train_text_encoder or self.lora_text_encoder
        for name in ("text_encoder_learning_rate", "text_encoder_steps"):
            if (value := getattr(self, name)) is not None and not is_trained:
                add = "--lora_text_encoder" if self.trains_lora else "--train_text_encoder"
                raise ValueError(
                    f"{_as_flag(name, value)} is of a text encoder that is trained, and it is not: add {add}, or drop "
                    f"--{name}"
                )
        if is_trained and self.cache_text:
            raise ValueError(
                "--cache_text keeps what the text encoder says of a caption, which changes as it is trained: drop it"
            )
        return self

    @model_validator(mode="after")
    def check(self) -> "Recipe":
        if self.pretrained_model_name_or_path is None and not self.dry_run:  # which looks at the data alone then
            raise ValueError(
                "--pretrained_model_name_or_path is missing: give a pipeline folder, a single file, a Hub id, or "
                "sd-recipes/tiny-emoji"
            )
        if self.streaming and self.max_train_steps is None:
            raise ValueError("--streaming does not know the number of rows: give --max_train_steps")
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token is refused, because flags are written to logs: log in with `hf auth login`, "
                "or set the environment variable HF_TOKEN"
            )
        if self.unet_config and not self.train_from_scratch:
            raise ValueError(
                "--unet_config describes a UNet without weights: add --train_from_scratch, or drop --unet_config"
            )
        if self.train_from_scratch and self.non_ema_revision:
            raise ValueError("--train_from_scratch loads no UNet, so --non_ema_revision contradicts it: drop one")
        if self.use_8bit_adam and self.optimizer not in EIGHT_BIT_ADAMW:
            raise ValueError(f"--use_8bit_adam contradicts --optimizer {self.optimizer}: drop one of them")
        if self.compile_unet and self.compile != "unet":
            raise ValueError(f"--compile_unet contradicts --compile {self.compile}: drop one of them")
        if self.ema_length != DIFFUSERS_LENGTH and self.ema_decay != OptimConfig.model_fields["ema_decay"].default:
            raise ValueError(
                f"--ema_decay {self.ema_decay} contradicts --ema_length {self.ema_length}, which gives the decays: "
                f"leave --ema_decay at 0.9999, or --ema_length at {DIFFUSERS_LENGTH}"
            )
        if self.overwrite and self.resume_from_checkpoint:
            raise ValueError("--overwrite starts over, which --resume_from_checkpoint contradicts: drop one")
        if self.validation_clip_model and not self.draws_pictures:
            raise ValueError(
                "--validation_clip_model scores validation pictures: give some --validation_prompts, or a "
                "--validation_split whose captions are drawn"
            )
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.tracker_project_name) or set(self.tracker_project_name) == {"."}:
            raise ValueError(
                f"--tracker_project_name {redacted(self.tracker_project_name)!r} becomes a folder's name: "
                "use letters, digits, dot, dash and underscore"
            )
        trackers = {"tensorboard", "wandb", "comet_ml", "all", "none"}
        if self.report_to not in trackers:
            raise ValueError(f"--report_to {redacted(self.report_to)!r} is not one of: {', '.join(sorted(trackers))}")
        if self.needs_contiguous_weights and self.channels_last == "always":
            raise ValueError(
                f"--channels_last always contradicts --optimizer {self.optimizer}, which needs contiguous weights: use "
                "auto"
            )
        if self.gradient_checkpointing and self.gradient_checkpointing_blocks:
            raise ValueError(
                "--gradient_checkpointing recomputes all blocks, and --gradient_checkpointing_blocks "
                f"{' '.join(self.gradient_checkpointing_blocks)} only some: drop one"
            )
        if self.fused_backward_pass and self.max_grad_norm not in (0, math.inf):
            raise ValueError(
                "--fused_backward_pass steps before the norm of all gradients is known, so that nothing can be clipped "
                "to it: add --max_grad_norm 0, or drop --fused_backward_pass"
            )
        if self.fused_backward_pass and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--fused_backward_pass frees each gradient at once, which --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} adds up: use a larger --train_batch_size, or drop one"
            )
        if self.fused_backward_pass and self.has_class_pictures:
            raise ValueError(
                "--fused_backward_pass steps within one backward pass, and class pictures (--class_data_dir, is_reg) "
                "take another: drop one"
            )
        for name, value in (("num_class_images", None), ("prior_preservation", "pictures")):
            if self.train_from_scratch and getattr(self, name) != value:
                raise ValueError(
                    f"--{name} {getattr(self, name)} needs what the model knows before it is trained, which with "
                    "--train_from_scratch is nothing: drop one"
                )
        if self.prior_preservation == "model" and self.rescale_betas_zero_snr:
            raise ValueError(
                "--prior_preservation model asks the model as it was, which does not know the noise of "
                "--rescale_betas_zero_snr: use --prior_preservation pictures, or drop one"
            )
        if self.compile == "graphs" and self.prior_preservation == "model" and self.trains_lora:
            raise ValueError(
                "--compile graphs writes all predictions of a UNet to the same memory, and with a LoRA the targets of "
                "--prior_preservation model are predictions of the same UNet: use --compile unet"
            )
        if self.fused_backward_pass and self.micro_batch not in (None, self.train_batch_size):
            raise ValueError(
                "--fused_backward_pass steps within one backward pass, which --micro_batch "
                f"{self.micro_batch} divides: drop one"
            )
        return self


def _as_flag(name: str, value: Any) -> str:
    """A setting as it is given on the command line."""
    if value is True:
        return f"--{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def odd_settings(recipe: Recipe) -> list[str]:
    """Warnings about settings that are probably a mistake, but run as they do in diffusers' script."""
    odd = []
    if recipe.dream_training and recipe.input_perturbation:
        odd.append(
            "--dream_training rectifies along the error of a prediction from the perturbed noise of "
            "--input_perturbation, so that both change the UNet's input: usually only one of them is set."
        )
    if isinstance(recipe.micro_batch, int) and recipe.micro_batch > recipe.train_batch_size:
        odd.append(
            f"--micro_batch {recipe.micro_batch} does nothing, for a batch has --train_batch_size "
            f"{recipe.train_batch_size} images."
        )
    if recipe.cudnn_benchmark and recipe.aspect_ratio_buckets:
        odd.append(
            "--cudnn_benchmark times every convolution anew for each of the sizes of --aspect_ratio_buckets, which may "
            "take longer than it saves."
        )
    changing = [
        name for name in ("shuffle_tags", "caption_tag_dropout_rate", "enable_wildcard") if getattr(recipe, name)
    ]
    if recipe.cache_text and changing:
        odd.append(
            f"--cache_text keeps text states of captions that come again, and --{changing[0]} makes new ones in every "
            "epoch: drop --cache_text, which then mostly costs time and memory."
        )
    if recipe.offload_ema and not (recipe.use_ema or recipe.ema_snapshots):
        odd.append("--offload_ema does nothing without --use_ema or --ema_snapshots.")
    if recipe.ema_length != DIFFUSERS_LENGTH and not recipe.use_ema:
        odd.append(f"--ema_length {recipe.ema_length} does nothing without --use_ema.")
    if recipe.ema_snapshots_limit is not None and not recipe.ema_snapshots:
        odd.append(f"--ema_snapshots_limit {recipe.ema_snapshots_limit} does nothing without --ema_snapshots.")
    if recipe.rescale_betas_zero_snr and recipe.weightings and not recipe.learned_uncertainty:
        odd.append(
            f"--{recipe.weightings[0]} gives weight 0 to the last timestep of --rescale_betas_zero_snr: sampling "
            "begins with it, and it is not trained."
        )
    if recipe.rescale_betas_zero_snr and recipe.max_timestep is not None:
        odd.append(
            "--max_timestep may leave out the last timestep of --rescale_betas_zero_snr, in which sampling begins."
        )
    for source in recipe.sources:
        if source.dataset_name is None and source.dataset_config_name is not None:
            odd.append(f"--dataset_config_name {source.dataset_config_name} is not read: {source.flag} has none.")
    return odd
