"""Run a training script as __main__ and write its peak memory, in bytes, to $PEAK_FILE.

    PEAK_FILE=peak.json python benchmarks/measured_run.py SCRIPT [FLAG ...]

LIMIT_GB in the environment is how much of a GPU's memory torch may reserve.

On a GPU it is the memory that torch reserved, otherwise the process's largest resident set. Where
torchvision is absent, diffusers' script gets the few transforms it uses from here, on Pillow: what
they compute is what torchvision's do on Pillow images.
"""

import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import runpy
import sys
import types


def stand_in_for_torchvision() -> None:
    """Call it before diffusers' script. What that imports comes first here: it asks whether there is a torchvision."""
    import datasets  # noqa: F401
    import diffusers
    import numpy as np
    import torch
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    _ = diffusers.StableDiffusionPipeline, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL

    def compose(steps):
        def apply(image):
            for step in steps:
                image = step(image)
            return image

        return apply

    def resize(size, interpolation):
        def apply(image):
            scale = size / min(image.size)
            return image.resize([max(size, int(side * scale)) for side in image.size], interpolation)

        return apply

    def crop(size, place):
        def apply(image):
            left, top = (place(side - size) for side in image.size)
            return image.crop((left, top, left + size, top + size))

        return apply

    def normalize(mean, std):
        shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return lambda pixels: (pixels - shift) / scale

    names = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
    module = types.ModuleType("torchvision.transforms")
    module.InterpolationMode = type("InterpolationMode", (), {name: getattr(Image.Resampling, name) for name in names})
    module.Compose = compose
    module.Resize = resize
    module.CenterCrop = lambda size: crop(size, lambda free: free // 2)
    module.RandomCrop = lambda size: crop(size, lambda free: random.randint(0, free))
    module.RandomHorizontalFlip = lambda: (
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image
    )
    module.ToTensor = lambda: (
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    )
    module.Normalize = normalize
    module.Lambda = lambda function: function
    package = types.ModuleType("torchvision")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    package.transforms = module
    sys.modules |= {"torchvision": package, "torchvision.transforms": module}


def peak_memory() -> int:
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    sys.argv = sys.argv[1:]
    if limit := os.environ.get("LIMIT_GB"):
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(limit) * 1e9 / total)
    with open(sys.argv[0]) as script:
        needs_torchvision = "torchvision" in script.read()
    if needs_torchvision and importlib.util.find_spec("torchvision") is None:
        stand_in_for_torchvision()
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
    with open(os.environ["PEAK_FILE"], "w") as file:
        json.dump(peak_memory(), file)


if __name__ == "__main__":
    main()
