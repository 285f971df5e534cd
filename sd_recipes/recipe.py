"""The recipe: every setting of a run, with its help and its checks.

One flat pydantic model made of small sections by inheritance: flat names for users, a narrow
section as the type of a function's argument. A value comes from the default, then from the
`--config` file, then from the flag; the three share one name. This module imports neither torch
nor diffusers, so that a mistake on the command line is answered at once.
"""

import argparse
import difflib
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

SHIPPED_RECIPES = Path(__file__).parent / "recipes"


class RunError(Exception):
    """An end of a run that is told in one line, without a traceback; `status` is the process's exit status."""

    status = 1


class RecipeError(RunError, ValueError):
    """A person's mistake: the line names the flag or the file, and the way out."""

    status = 2


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


Number = Annotated[float, BeforeValidator(_number_from_text)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=False, protected_namespaces=())


class RunConfig(Section):
    """Run and output."""

    config: str | None = Field(None, description="A YAML recipe: a path, or the name of a shipped one (quickstart).")
    dry_run: bool = Field(False, description="Print the resolved recipe with its derived numbers, and leave.")
    output_dir: str = Field("sd-model-finetuned", description="Where checkpoints, logs and the pipeline are written.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of every random draw; drawn and recorded if not given."
    )
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, BeforeValidator(_no_from_false)] = Field(
        None, description="Autocast type. If not given, accelerate's configuration decides."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to train; `auto` leaves it to accelerate."
    )
    allow_tf32: bool = Field(False, description="TF32 matrix products on Ampere GPUs and later.")
    local_rank: int = Field(-1, description="Accepted for old launchers; the environment's LOCAL_RANK is used.")


class ModelConfig(Section):
    """Model."""

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


class DataConfig(Section):
    """Data."""

    dataset_name: str | None = Field(
        None, description="A Hub data set, a folder, a .parquet or .arrow file, or sd-recipes/emoji."
    )
    dataset_config_name: str | None = Field(None, description="Configuration of the data set, if it has several.")
    train_data_dir: str | None = Field(
        None, description="Folder of images with a metadata.jsonl, whose `text` holds the captions."
    )
    train_split: str = Field("train", description="Split of the data set to train on.")
    image_column: str = Field("image", description="Column with the image.")
    caption_column: str = Field("text", description="Column with the caption, or with a list of captions.")
    max_train_samples: int | None = Field(None, ge=1, description="Train on this many rows, drawn by the seed.")
    resolution: int = Field(512, ge=8, description="Width and height of the training images, in pixels.")
    center_crop: bool = Field(False, description="Crop the middle; otherwise crop at random.")
    random_flip: bool = Field(False, description="Mirror images left to right at random.")
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = Field("lanczos", description="Filter for resizing.")
    caption_dropout: Number = Field(
        0.0, ge=0, le=1, description="Share of captions replaced by the empty one, for classifier-free guidance."
    )
    dataloader_num_workers: int = Field(0, ge=0, description="Loader processes; 0 reads ahead in a thread.")


class ObjectiveConfig(Section):
    """Objective."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="What the UNet predicts; if not given, what the model's scheduler says."
    )
    snr_gamma: Number | None = Field(None, gt=0, description="Min-SNR weighting; 5.0 is recommended.")
    noise_offset: Number = Field(0.0, ge=0, description="Scale of a noise that is constant over a channel.")
    input_perturbation: Number = Field(0.0, ge=0, description="Scale of extra noise on the input; 0.1 is recommended.")
    dream_training: bool = Field(False, description="DREAM: a second forward pass rectifies noise and target.")
    dream_detail_preservation: Number = Field(1.0, gt=0, description="DREAM's exponent p.")


class OptimConfig(Section):
    """Optimization."""

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
    """Memory and speed."""

    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, slower.")
    enable_xformers_memory_efficient_attention: bool = Field(
        False, description="Accepted; PyTorch's own attention is used, with a warning, where xFormers is absent."
    )
    channels_last: Literal["auto", "always", "never"] = Field(
        "auto", description="Memory format of UNet and VAE; auto: channels last, but for float32 on a GPU."
    )
    compile_unet: bool = Field(False, description="Compile the UNet with torch.compile.")


class CheckpointConfig(Section):
    """Checkpoints."""

    checkpointing_steps: int = Field(500, ge=1, description="Save the state every so many optimizer steps.")
    checkpoints_total_limit: int | None = Field(None, ge=1, description="Keep this many of the newest checkpoints.")
    resume_from_checkpoint: str | None = Field(None, description="`latest`, or the path of a checkpoint.")


class ValidationConfig(Section):
    """Validation and tracking."""

    validation_prompts: list[str] | None = Field(None, description="Prompts to draw at every validation.")
    validation_epochs: int = Field(5, ge=1, description="Validate after every so many epochs.")
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
    """Hub."""

    push_to_hub: bool = Field(False, description="Upload the pipeline at the end.")
    hub_model_id: str | None = Field(None, description="Repository to push to; otherwise the output folder's name.")
    hub_token: str | None = Field(
        None, description="Refused: it would end up in logs. Use `hf auth login` or HF_TOKEN."
    )


SECTIONS = (
    RunConfig, ModelConfig, DataConfig, ObjectiveConfig, OptimConfig, MemoryConfig, CheckpointConfig,
    ValidationConfig, HubConfig,
)  # fmt: skip


class Recipe(
    RunConfig, ModelConfig, DataConfig, ObjectiveConfig, OptimConfig, MemoryConfig, CheckpointConfig,
    ValidationConfig, HubConfig,
):  # fmt: skip
    """All settings of a run. Raises pydantic's ValidationError, which `load_recipe` turns into RecipeError."""

    @model_validator(mode="after")
    def check(self) -> "Recipe":
        if self.pretrained_model_name_or_path is None:
            raise ValueError(
                "--pretrained_model_name_or_path is missing: give a pipeline folder, a Hub id, or sd-recipes/tiny-emoji"
            )
        if self.dataset_name is None and self.train_data_dir is None:
            raise ValueError("no data: give --train_data_dir FOLDER or --dataset_name NAME")
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
        if self.dream_training and self.input_perturbation:
            raise ValueError("--dream_training and --input_perturbation both change the UNet's input: drop one")
        if not self.use_ema and self.offload_ema:
            raise ValueError("--offload_ema needs --use_ema: add it, or drop --offload_ema")
        if self.validation_clip_model and not self.validation_prompts:
            raise ValueError("--validation_clip_model scores the pictures of --validation_prompts: give some prompts")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.tracker_project_name) or set(self.tracker_project_name) == {"."}:
            raise ValueError(
                f"--tracker_project_name {self.tracker_project_name!r} becomes a folder's name: "
                "use letters, digits, dot, dash and underscore"
            )
        trackers = {"tensorboard", "wandb", "comet_ml", "all", "none"}
        if self.report_to not in trackers:
            raise ValueError(f"--report_to {self.report_to!r} is not one of: {', '.join(sorted(trackers))}")
        if self.use_8bit_adam:
            self.optimizer = "adamw8bit"
        if self.optimizer == "adamw8bit" and self.channels_last == "always":
            raise ValueError("--channels_last always contradicts AdamW8bit, which makes weights contiguous: use auto")
        return self


def load_recipe(argv: list[str] | None = None) -> Recipe:
    """Recipe from defaults, then the `--config` file, then the flags in `argv` (default: sys.argv[1:]).

    Raises RecipeError for an unknown flag or key (with the nearest name), a value of the wrong type
    or out of range, and settings that contradict each other.
    """
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    settings = read_recipe_file(flags["config"]) if flags.get("config") else {}
    return build_recipe({**settings, **flags}, settings)


def build_recipe(settings: dict[str, Any], from_file: dict[str, Any] | None = None) -> Recipe:
    """Recipe from a mapping of settings, of which those in `from_file` are blamed on the file."""
    try:
        return Recipe(**settings)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(problem, from_file or {}) for problem in error.errors())) from None


def _explain(problem: Any, from_file: dict[str, Any]) -> str:
    if not problem["loc"]:
        return problem["msg"].removeprefix("Value error, ")
    name = str(problem["loc"][0])
    place = f"key {name} of the recipe file" if name in from_file else f"--{name}"
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]} (it is {problem['input']!r})"


def read_recipe_file(name: str) -> dict[str, Any]:
    """Settings in a YAML recipe: a path, or the name of a shipped recipe. Raises RecipeError."""
    path = Path(name)
    if not path.is_file():
        path = SHIPPED_RECIPES / f"{name}.yaml"
    if not path.is_file():
        shipped = sorted(recipe.stem for recipe in SHIPPED_RECIPES.glob("*.yaml"))
        raise RecipeError(f"--config {name}: no such file, nor a shipped recipe{_nearest(name, shipped)}: {shipped}")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"--config {path}: a recipe is a list of `key: value` lines, not a {type(settings).__name__}")
    for key in settings:
        if key not in Recipe.model_fields:
            raise RecipeError(f"--config {path}: unknown key {key!r}{_nearest(str(key), Recipe.model_fields)}")
    settings.pop("config", None)
    return settings


# What a file of the resolved recipe leaves out: how this call was made, and what a repetition must not do again.
NOT_OF_THE_RUN = {
    "config", "dry_run", "hub_token", "local_rank", "use_8bit_adam", "resume_from_checkpoint", "push_to_hub",
}  # fmt: skip


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `--config` with a file of it gives the same run again."""
    settings = recipe.model_dump(exclude=NOT_OF_THE_RUN)
    lines = ["# Resolved recipe. Run it again with --config and this file.\n"]
    for section in SECTIONS:
        names = [name for name in section.model_fields if name in settings]
        lines.append(f"\n# {section.__doc__}\n")
        lines.append(yaml.safe_dump({name: settings[name] for name in names}, sort_keys=False, allow_unicode=True))
    return "".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)


def build_parser() -> argparse.ArgumentParser:
    """One flag a field, grouped by section, with the field's help and default."""
    parser = _Parser(
        prog="train_text_to_image.py",
        description="Fine-tune, or train from scratch, a Stable Diffusion text-to-image model.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for section in SECTIONS:
        group = parser.add_argument_group((section.__doc__ or "").rstrip("."))
        for name, field in section.model_fields.items():
            default = "" if field.default is None else f" [{field.default}]"
            options: dict[str, Any] = {"help": f"{field.description}{default}".replace("%", "%%")}
            kind, choices, is_list = _flag_kind(field.annotation)
            if kind is bool:
                options |= {"action": argparse.BooleanOptionalAction}
            else:
                options |= {
                    "type": kind,
                    "choices": choices,
                    "metavar": None if choices else name.split("_")[-1].upper(),
                }
                if is_list:
                    options["nargs"] = "+"
            group.add_argument(f"--{name}", **options)
    return parser


def _flag_kind(annotation: Any) -> tuple[type, list[str] | None, bool]:
    """Python type, choices and whether several values are taken, of a field's annotation."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return str, list(typing.get_args(annotation)), False
    if typing.get_origin(annotation) is list:
        return str, None, True
    return annotation, None, False


def parse_flags(argv: list[str]) -> dict[str, Any]:
    """The flags that were given, by name. Raises RecipeError, with the nearest name of an unknown flag."""
    flags, unknown = build_parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        names = [f"--{field}" for field in Recipe.model_fields]
        raise RecipeError(f"unknown flag {name}{_nearest(name, names)}; --help lists all")
    return vars(flags)


def _nearest(name: str, names: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""


def recipe_schema() -> str:
    """JSON schema of a recipe file, with which editors complete and check it."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"
