"""The text that A1111 writes into a PNG's chunk `parameters`, by which people and programs draw a picture again."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sd_recipes import __version__

KEYWORD = "parameters"
# What A1111 calls diffusers' samplers; others keep their class's name.
SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "PNDMScheduler": "PLMS",
    "LMSDiscreteScheduler": "LMS",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2DiscreteScheduler": "DPM2",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "UniPCMultistepScheduler": "UniPC",
}


def parameters_text(prompt: str, negative_prompt: str | None, values: Mapping[str, object]) -> str:
    """A picture's prompts, and values by A1111's names for them, such as `CFG scale`; those that are None are left out.

    The noise is said to be the CPU's, as it is. Prompts are on one line each: readers find the next text by its line.
    """
    lines = [" ".join(prompt.splitlines())]
    if negative_prompt:
        lines.append("Negative prompt: " + " ".join(negative_prompt.splitlines()))
    values = {**values, "RNG": "CPU", "Version": f"sd-recipes {__version__}"}
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
