"""Image sizes to aspect-ratio buckets.

Training pictures of several shapes and nearly the same area, as in NovelAI's aspect ratio bucketing ("NovelAI
Improvements on Stable Diffusion", 2022): little of a picture is cropped away, and a batch has one shape.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from sd_recipes.data.images import ImageError
from sd_recipes.errors import RecipeError

MAX_ASPECT_RATIO = 4


@dataclass(frozen=True)
class Buckets:
    """The shapes to train on: sides are multiples of `step`, areas at most `resolution`².

    The square is among them; where `resolution` is not a multiple of `step`, it is rounded down to one. Raises
    RecipeError if not even one step fits.
    """

    resolution: int
    step: int
    max_upscale: float

    def __post_init__(self) -> None:
        if self.step > self.resolution:
            raise RecipeError(f"--bucket_step {self.step} is over --resolution {self.resolution}: make it smaller")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All buckets of the full area, (height, width): for every width the largest height, and vice versa."""
        return list(_sizes(self.resolution, self.step))

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """The bucket (height, width) for a picture: nearest in log aspect ratio, enlarged by at most `max_upscale`.

        A picture that is too small for all of them gets the nearest of the buckets for a resolution that is one step
        smaller, and so on. Raises ImageError if it would be enlarged too much even to step × step.
        """
        aspect = math.log(width) - math.log(height)

        def distance(size: tuple[int, int]) -> float:
            return abs(aspect - (math.log(size[1]) - math.log(size[0])))

        for resolution in range(self.resolution, self.step - 1, -self.step):
            allowed = [
                size
                for size in _sizes(resolution, self.step)
                if size[0] <= self.max_upscale * height and size[1] <= self.max_upscale * width
            ]
            if allowed:
                return min(allowed, key=distance)  # of equals, the first: the squarest, then the largest
        raise ImageError(
            f"a picture of {width} × {height} is too small: it would be enlarged more than --max_upscale "
            f"{self.max_upscale:g} to {self.step} × {self.step}"
        )


@functools.lru_cache(maxsize=1024)
def _sizes(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) of at most resolution² pixels, the squarest first, then the largest."""
    area = resolution**2 // step**2  # in squares of the step
    square = resolution // step
    # The longer side for every shorter one, then the reverse: together the same when width and height swap.
    pairs = {(square, square)}
    pairs |= {(side, area // side) for side in range(1, area + 1)}
    pairs |= {(long, short) for short, long in pairs}
    shapes = [(high, wide) for high, wide in pairs if max(high, wide) <= MAX_ASPECT_RATIO * min(high, wide)]
    shapes.sort(key=lambda shape: (max(shape) / min(shape), -shape[0] * shape[1], shape))
    return tuple((high * step, wide * step) for high, wide in shapes)
