"""Samplers by name."""

import re

from sd_recipes.errors import nearest

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
