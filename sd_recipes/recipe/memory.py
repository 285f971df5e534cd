"""Settings of memory and speed."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from sd_recipes.recipe.section import Section, setting
from sd_recipes.sizes import bytes_of


def _number_or_auto(value: Any) -> Any:
    """The command line gives numbers as text here. Raises ValueError for what is neither."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value not in (None, "auto") and (type(value) is not int or value < 1):
        raise ValueError("give a number from 1, or auto")
    return value


NumberOrAuto = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"] | None, BeforeValidator(_number_or_auto)]


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
