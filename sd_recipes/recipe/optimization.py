"""Settings of the batch, the optimizer, its learning rates, and averages of the weights."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sd_recipes.optimizers import (
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
from sd_recipes.recipe.section import Number, Section, setting

# Relative widths of averages of the weights. That of diffusers' warm-up, √(9/11)/10, to two digits; and that of the
# plain mean of all steps, which is the widest: see training/profiles.py.
DIFFUSERS_LENGTH, WIDEST_LENGTH = 0.09, 12**-0.5


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
