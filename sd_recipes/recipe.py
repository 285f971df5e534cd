"""The recipe: every setting of a run, with its help and its checks.

One flat pydantic model made of small sections by inheritance: flat names for users, a narrow
section as the type of a function's argument. Flag, key of a recipe file and attribute share one name.
This module imports neither torch nor diffusers, so that a mistake on the command line is answered at once.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from sd_recipes.redaction import LEFT_OUT, has_login, in_texts, redacted


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


def _check_no_password(text: str) -> str:
    if has_login(text):
        raise ValueError(
            "a user's name or password in an address is refused, because recipes are written down and shared: give it "
            "in ~/.netrc (https), in the environment (HF_TOKEN of the Hub, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY of s3), or in fsspec's configuration (~/.config/fsspec)"
        )
    if LEFT_OUT in text:
        raise ValueError(f"{LEFT_OUT} stands for a secret that was not written down: give the whole value")
    return text


Number = Annotated[float, BeforeValidator(_number_from_text)]


class Section(BaseModel):
    """Settings that belong together; a section's docstring is `Title: description.`, as help and docs show it."""

    # A ValidationError would print what was given, which may hold a password.
    model_config = ConfigDict(
        extra="forbid", validate_assignment=False, protected_namespaces=(), hide_input_in_errors=True
    )

    @field_validator("*")
    @classmethod
    def hold_no_password(cls, value: Any) -> Any:
        """Refuse what would be written down with the recipe. Raises ValueError."""
        in_texts(_check_no_password, value)
        return value


def heading(section: type[Section]) -> tuple[str, str]:
    """Title and description of a section."""
    title, _, description = (section.__doc__ or "").partition(": ")
    return title, description[:1].upper() + description[1:]


class RunConfig(Section):
    """Run and output: the recipe, the folder of the run, its seed, precision and device."""

    config: str | None = Field(None, description="A YAML recipe: a path, or the name of a shipped one (quickstart).")
    dry_run: bool = Field(False, description="Print the resolved recipe with its derived numbers, and leave.")
    output_dir: str = Field(
        "sd-model-finetuned",
        description="Where checkpoints, logs and the pipeline are written; a run that is there is continued.",
    )
    overwrite: bool = Field(False, description="Remove the run that is in --output_dir, and start anew.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of every random draw; drawn and recorded if not given."
    )
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, BeforeValidator(_no_from_false)] = Field(
        None, description="Autocast type. If not given, accelerate's configuration decides."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to train; `auto` leaves it to accelerate."
    )
    allow_tf32: bool = Field(False, description="TF32 in matrix products and convolutions, on Ampere GPUs and later.")
    local_rank: int = Field(-1, description="Accepted for old launchers; the environment's LOCAL_RANK is used.")


class ModelConfig(Section):
    """Model: the pipeline that training starts from."""

    pretrained_model_name_or_path: str | None = Field(
        None, description="A pipeline folder in diffusers format, a Hub id, or sd-recipes/tiny-emoji."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub model.")
    variant: str | None = Field(None, description="Variant of the weight files, such as fp16.")
    non_ema_revision: str | None = Field(None, description="Revision of the UNet only (deprecated: --variant non_ema).")
    cache_dir: str | None = Field(None, description="Where downloads are kept.")
    train_from_scratch: bool = Field(False, description="Start from a UNet with fresh random weights.")
    unet_config: str | None = Field(
        None, description="JSON file with the UNet's configuration (needs --train_from_scratch)."
    )


class DataSource(Section):
    """One of several sources of rows, mixed by weight; fields as the flags of the same names."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_data_dir: str | None = None
    train_split: str = "train"
    weight: Number = Field(1.0, gt=0)

    @property
    def flag(self) -> str:
        """How a message names the source."""
        if self.dataset_name is not None:
            return f"--dataset_name {self.dataset_name}"
        return f"--train_data_dir {self.train_data_dir}"


class DataConfig(Section):
    """Data: where the rows come from, and what becomes of those that cannot be used."""

    dataset_name: str | None = Field(
        None, description="A Hub data set, a folder, a .parquet, .arrow or .tar file (globs and URLs too), "
        "or sd-recipes/emoji."
    )  # fmt: skip
    dataset_config_name: str | None = Field(None, description="Configuration of the data set, if it has several.")
    dataset_revision: str | None = Field(None, description="Branch, tag or commit of the Hub data set.")
    train_data_dir: str | None = Field(
        None, description="Folder of images with a metadata.jsonl or .csv, whose `text` holds the captions."
    )
    train_split: str = Field("train", description="Split of the data set to train on.")
    data_sources: list[DataSource] | None = Field(
        None, description="Several sources mixed by weight, instead of --dataset_name; in a recipe file only."
    )
    image_column: str = Field("image", description="Column with the image.")
    max_train_samples: int | None = Field(None, ge=1, description="Train on this many rows, drawn by the seed.")
    streaming: bool = Field(False, description="Read rows as they come, from the Hub, local files or a URL.")
    shuffle_block: int = Field(1000, ge=1, description="Rows of a stream that are shuffled together, per process.")
    stream_outage_minutes: Number = Field(
        10.0, ge=0, description="How long a stream may fail on end before the run gives up."
    )
    check_data: Literal["full", "sample", "off"] = Field(
        "sample", description="Check rows before a model is loaded: all, a sample, or none."
    )
    max_bad_rows: int | None = Field(
        None, ge=0, description="Stop when more rows than this could not be used; otherwise at 1 % of the rows."
    )
    dataloader_num_workers: int = Field(0, ge=0, description="Loader processes; 0 reads ahead in a thread.")

    @property
    def sources(self) -> list[DataSource]:
        """The sources to mix; one, where they are given by flags."""
        if self.data_sources:
            return self.data_sources
        return [
            DataSource(
                dataset_name=self.dataset_name,
                dataset_config_name=self.dataset_config_name,
                dataset_revision=self.dataset_revision,
                train_data_dir=self.train_data_dir,
                train_split=self.train_split,
            )
        ]


class ImageConfig(Section):
    """Images: how a picture is brought to the size of training."""

    resolution: int = Field(512, ge=8, description="Width and height of the training images, in pixels.")
    center_crop: bool = Field(False, description="Crop the middle; otherwise crop at random. Same as --crop center.")
    crop: Literal["random", "center", "none"] | None = Field(
        None, description="Where to crop; `none` fits the whole image in, changing its shape."
    )
    random_flip: bool = Field(False, description="Mirror images left to right at random.")
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = Field("lanczos", description="Filter for resizing.")
    max_image_megapixels: Number = Field(
        100.0, gt=0, description="Larger images are bad rows: a small file can unfold to more memory than there is."
    )
    aspect_ratio_buckets: bool = Field(
        False, description="Train on several shapes of about --resolution² pixels, each image on the nearest."
    )
    bucket_step: int = Field(64, ge=8, description="Sides of the buckets are multiples of this many pixels.")
    max_upscale: Number = Field(
        2.0, ge=1, description="With buckets, enlarge no image more than this; smaller ones get smaller buckets."
    )

    @property
    def cropping(self) -> str:
        """`random`, `center` or `none`."""
        return self.crop or ("center" if self.center_crop else "random")


class CaptionConfig(Section):
    """Captions: which text goes with a picture, and what becomes of missing and long ones."""

    caption_column: str = Field("text", description="Column with the caption, or with a list of captions.")
    caption_columns: list[str] | None = Field(
        None, description="Several columns of captions instead, of which a sample draws one."
    )
    caption_template: str | None = Field(
        None, description='Caption made of columns, such as "a photo of {name}", instead of a caption column.'
    )
    shuffle_tags: bool = Field(False, description="Shuffle the parts of a caption between --tag_separator.")
    keep_tags: int = Field(0, ge=0, description="With --shuffle_tags, leave this many leading parts in place.")
    tag_separator: str = Field(",", min_length=1, description="What separates the tags of a caption.")
    caption_dropout: Number = Field(
        0.0, ge=0, le=1, description="Share of captions replaced by the empty one, for classifier-free guidance."
    )
    blank_captions: Literal["skip", "empty", "error"] = Field(
        "skip",
        description="Rows whose caption is missing or blank: skip them as bad, train on the empty caption, or stop.",
    )
    long_captions: Literal["error", "truncate", "chunk"] = Field(
        "truncate", description="Captions over the tokenizer's limit: stop, cut, or encode in several chunks."
    )
    caption_chunks: int = Field(
        3, ge=1, description="With --long_captions chunk, the number of chunks of every caption; longer ones are cut."
    )


class CacheConfig(Section):
    """Caches: what is computed once and kept, instead of in every epoch."""

    cache_latents: Literal["disk", "memory", "off"] = Field(
        "off", description="Keep the VAE's moments, so that later epochs skip decoding and VAE; needs a fixed crop."
    )
    latent_cache_dir: str | None = Field(
        None, description="Where moments are kept, shared between runs; otherwise in the output folder."
    )
    latent_cache_dtype: Literal["fp16", "bf16"] = Field("fp16", description="Precision of the kept moments.")
    cache_text: bool = Field(
        False, description="Keep the text states of captions, up to 1 GiB of them; for few and fixed ones."
    )


class ObjectiveConfig(Section):
    """Objective: what the UNet learns to predict, and how its errors are weighted."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="What the UNet predicts; if not given, what the model's scheduler says."
    )
    snr_gamma: Number | None = Field(None, gt=0, description="Min-SNR weighting; 5.0 is recommended.")
    noise_offset: Number = Field(0.0, ge=0, description="Scale of a noise that is constant over a channel.")
    input_perturbation: Number = Field(0.0, ge=0, description="Scale of extra noise on the input; 0.1 is recommended.")
    dream_training: bool = Field(False, description="DREAM: a second forward pass rectifies noise and target.")
    dream_detail_preservation: Number = Field(1.0, ge=0, description="DREAM's exponent p.")


class OptimConfig(Section):
    """Optimization: batch size, steps, optimizer, learning rate and averaged weights."""

    train_batch_size: int = Field(16, ge=1, description="Images per device and micro-batch.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    num_train_epochs: int = Field(100, ge=1, description="Passes over the data.")
    max_train_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides --num_train_epochs.")
    optimizer: Literal["adamw", "adamw8bit", "sgd", "adafactor"] = Field("adamw", description="Optimizer.")
    use_8bit_adam: bool = Field(False, description="Same as --optimizer adamw8bit (bitsandbytes).")
    learning_rate: Number = Field(1e-4, ge=0, description="Learning rate after the warm-up.")
    scale_lr: bool = Field(False, description="Multiply the learning rate by the global batch size.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = Field("constant", description="Learning-rate schedule, in optimizer steps.")
    lr_warmup_steps: int = Field(500, ge=0, description="Optimizer steps of warm-up.")
    adam_beta1: Number = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate.")
    adam_beta2: Number = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate.")
    adam_weight_decay: Number = Field(1e-2, ge=0, description="Weight decay, of every optimizer.")
    adam_epsilon: Number = Field(1e-8, gt=0, description="AdamW's epsilon.")
    sgd_momentum: Number = Field(0.9, ge=0, lt=1, description="SGD's momentum.")
    max_grad_norm: Number = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    use_ema: bool = Field(False, description="Keep an exponential moving average of the weights, and export it.")
    ema_decay: Number = Field(0.9999, ge=0, lt=1, description="The average's largest decay.")
    offload_ema: bool = Field(False, description="Keep the average in the host's memory.")
    foreach_ema: bool = Field(False, description="Accepted; the average is always updated with foreach operations.")


class MemoryConfig(Section):
    """Memory and speed: what trades the one for the other."""

    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, slower.")
    enable_xformers_memory_efficient_attention: bool = Field(
        False, description="Accepted; PyTorch's own attention is used, with a warning, where xFormers is absent."
    )
    channels_last: Literal["auto", "always", "never"] = Field(
        "auto", description="Memory format of UNet and VAE; auto: channels last, but for float32 on a GPU."
    )
    compile_unet: bool = Field(False, description="Compile the UNet with torch.compile.")


class CheckpointConfig(Section):
    """Checkpoints: how often the state of a run is saved, and from which it goes on."""

    checkpointing_steps: int = Field(500, ge=1, description="Save the state every so many optimizer steps.")
    checkpointing_minutes: Number | None = Field(
        None, gt=0, description="Save it also when the last time is so many minutes ago."
    )
    checkpoints_total_limit: int | None = Field(None, ge=1, description="Keep this many of the newest checkpoints.")
    resume_from_checkpoint: str | None = Field(
        None, description="`latest`, which is the default where --output_dir holds a run, or the path of a checkpoint."
    )


class ValidationConfig(Section):
    """Validation and tracking: what is drawn and measured on the way, and where the numbers go."""

    validation_prompts: list[str] | None = Field(None, description="Prompts to draw at every validation.")
    validation_epochs: int = Field(5, ge=1, description="Validate after every so many epochs.")
    validation_steps: int | None = Field(None, ge=1, description="Validate every so many steps, not by epochs.")
    validation_split: str | None = Field(None, description="Split for the held-out loss.")
    validate_before_training: bool = Field(False, description="Validate at step 0 too, and write before_after.png.")
    validation_inference_steps: int = Field(20, ge=1, description="Denoising steps of a validation picture.")
    validation_guidance_scale: Number = Field(7.5, ge=0, description="Guidance scale of a validation picture.")
    validation_clip_model: str | None = Field(
        None, description="CLIP model for the image-text score of validation pictures (folder, Hub id, "
        "or sd-recipes/tiny-clip)."
    )  # fmt: skip
    logging_dir: str = Field("logs", description="TensorBoard folder, inside --output_dir.")
    logging_steps: int = Field(10, ge=1, description="Log every so many steps; others never wait for the device.")
    report_to: str = Field("tensorboard", description="tensorboard, wandb, comet_ml, all or none.")
    tracker_project_name: str = Field("text2image-fine-tune", description="Name of the run in the trackers.")


class HubConfig(Section):
    """Hub: publishing the pipeline on the Hugging Face Hub."""

    push_to_hub: bool = Field(False, description="Upload the pipeline at the end.")
    hub_model_id: str | None = Field(None, description="Repository to push to; otherwise the output folder's name.")
    hub_token: str | None = Field(
        None, description="Refused: it would end up in logs. Use `hf auth login` or HF_TOKEN."
    )


ONLY_IN_FILES = {"data_sources"}  # what a flag cannot say
SECTIONS: tuple[type[Section], ...] = (
    RunConfig, ModelConfig, DataConfig, ImageConfig, CaptionConfig, CacheConfig, ObjectiveConfig, OptimConfig,
    MemoryConfig, CheckpointConfig, ValidationConfig, HubConfig,
)  # fmt: skip


class Recipe(
    RunConfig, ModelConfig, DataConfig, ImageConfig, CaptionConfig, CacheConfig, ObjectiveConfig, OptimConfig,
    MemoryConfig, CheckpointConfig, ValidationConfig, HubConfig,
):  # fmt: skip
    """All settings of a run. Raises pydantic's ValidationError, which `load_recipe` turns into RecipeError."""

    @model_validator(mode="after")
    def check(self) -> "Recipe":
        if self.pretrained_model_name_or_path is None:
            raise ValueError(
                "--pretrained_model_name_or_path is missing: give a pipeline folder, a Hub id, or sd-recipes/tiny-emoji"
            )
        check_data_settings(self)
        if self.streaming and self.max_train_steps is None:
            raise ValueError("--streaming knows no number of rows: give --max_train_steps")
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
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"--use_8bit_adam contradicts --optimizer {self.optimizer}: drop one of them")
        if self.dream_training and self.prediction_type not in (None, "epsilon"):
            raise ValueError(
                f"--dream_training is defined for the prediction type epsilon, not for {self.prediction_type}: drop one"
            )
        if self.overwrite and self.resume_from_checkpoint:
            raise ValueError("--overwrite starts anew, which --resume_from_checkpoint contradicts: drop one")
        if self.validation_clip_model and not self.validation_prompts:
            raise ValueError("--validation_clip_model scores the pictures of --validation_prompts: give some prompts")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.tracker_project_name) or set(self.tracker_project_name) == {"."}:
            raise ValueError(
                f"--tracker_project_name {redacted(self.tracker_project_name)!r} becomes a folder's name: "
                "use letters, digits, dot, dash and underscore"
            )
        trackers = {"tensorboard", "wandb", "comet_ml", "all", "none"}
        if self.report_to not in trackers:
            raise ValueError(f"--report_to {redacted(self.report_to)!r} is not one of: {', '.join(sorted(trackers))}")
        if self.use_8bit_adam:
            self.optimizer = "adamw8bit"
        if self.optimizer == "adamw8bit" and self.channels_last == "always":
            raise ValueError("--channels_last always contradicts AdamW8bit, which makes weights contiguous: use auto")
        return self


def odd_settings(recipe: Recipe) -> list[str]:
    """What is hardly meant, and runs as in diffusers' script all the same."""
    odd = []
    if recipe.dream_training and recipe.input_perturbation:
        odd.append(
            "--dream_training rectifies along the error of a prediction from the perturbed noise of "
            "--input_perturbation, so that both change the UNet's input: one of them is usual."
        )
    if recipe.offload_ema and not recipe.use_ema:
        odd.append("--offload_ema does nothing without --use_ema.")
    for source in recipe.sources:
        if source.dataset_name is None and source.dataset_config_name is not None:
            odd.append(f"--dataset_config_name {source.dataset_config_name} is not read: {source.flag} has none.")
    return odd


def check_data_settings(config: Any) -> None:
    """What the data, image, caption and cache sections may not ask for together. Raises ValueError."""
    if config.data_sources is not None:
        if config.dataset_name or config.train_data_dir:
            raise ValueError("data_sources of the recipe file contradict --dataset_name and --train_data_dir: drop one")
        if not config.data_sources:
            raise ValueError("data_sources of the recipe file is empty: name a dataset_name or a train_data_dir")
        for name in ("dataset_config_name", "dataset_revision", "train_split"):
            # A resolved recipe names them too, at their defaults.
            if getattr(config, name) != DataConfig.model_fields[name].default:
                raise ValueError(
                    f"--{name} {getattr(config, name)} is not read beside data_sources of the recipe file: name it in "
                    "the sources that it is meant for"
                )
    if any(source.dataset_name is None and source.train_data_dir is None for source in config.sources):
        raise ValueError("no data: give --train_data_dir FOLDER or --dataset_name NAME")
    for source in config.sources:
        if source.dataset_name is None and source.dataset_revision is not None:
            raise ValueError(f"{source.flag} has no revisions: drop --dataset_revision {source.dataset_revision}")
    if config.center_crop and config.crop not in (None, "center"):
        raise ValueError(f"--center_crop contradicts --crop {config.crop}: drop one")
    if config.caption_columns and config.caption_template:
        raise ValueError("--caption_columns and --caption_template both say what the caption is: drop one")
    if config.keep_tags and not config.shuffle_tags:
        raise ValueError("--keep_tags needs --shuffle_tags: add it, or drop --keep_tags")
    if config.streaming and config.max_train_samples is not None:
        raise ValueError(
            "--max_train_samples draws from all rows, which a stream does not know: drop it, or drop --streaming"
        )
    if config.cache_latents != "off" and config.cropping == "random":
        raise ValueError(
            "--cache_latents keeps one crop of an image, and the crop is random: add --center_crop or --crop none"
        )
