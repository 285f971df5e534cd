"""Settings of the run itself, of its checkpoints, and of publishing on the Hub."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from sd_recipes.recipe.section import Number, Section, setting


def _no_from_false(value: Any) -> Any:
    """YAML 1.1 reads a bare `no` as false."""
    return "no" if value is False else value


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


class HubConfig(Section):
    """Hub: publishing the pipeline on the Hugging Face Hub."""

    push_to_hub: bool = setting(False, "free", "Upload the pipeline at the end.")
    hub_model_id: str | None = setting(None, "free", "Repository to push to; if not given, the output folder's name.")
    hub_token: str | None = setting(None, "free", "Refused: it would end up in logs. Use `hf auth login` or HF_TOKEN.")
