import math

import numpy as np
import pytest

from sd_recipes.data.buckets import MAX_ASPECT_RATIO, Buckets
from sd_recipes.data.images import ImageError
from sd_recipes.errors import RecipeError

TABLES = [Buckets(512, 64, 2.0), Buckets(1024, 64, 1.0), Buckets(500, 64, 1.5), Buckets(64, 8, 2.0), Buckets(64, 64, 2)]


def pictures(number: int = 400) -> list[tuple[int, int]]:
    """Sizes (width, height) of all magnitudes and shapes, some of them square."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(math.log(1), math.log(8000), (number, 2))).astype(int)
    sides[::10, 1] = sides[::10, 0]
    return [(int(width), int(height)) for width, height in sides]


def aspect_distance(size: tuple[int, int], width: int, height: int) -> float:
    return abs(math.log(size[1] / size[0]) - math.log(width / height))


def enlargement(size: tuple[int, int], width: int, height: int) -> float:
    return max(size[0] / height, size[1] / width)


@pytest.mark.parametrize("buckets", TABLES)
def test_the_table_is_bounded_and_symmetric(buckets: Buckets) -> None:
    sizes = buckets.sizes
    assert len(set(sizes)) == len(sizes)
    square = buckets.resolution // buckets.step * buckets.step
    assert (square, square) in sizes
    for height, width in sizes:
        assert height % buckets.step == width % buckets.step == 0
        assert height * width <= buckets.resolution**2
        assert 1 / MAX_ASPECT_RATIO <= width / height <= MAX_ASPECT_RATIO
        assert (width, height) in sizes
        if (height, width) != (square, square):  # one of the sides could not grow
            grown = max(height * (width + buckets.step), (height + buckets.step) * width)
            assert grown > buckets.resolution**2


def test_the_table_of_512_is_known() -> None:
    assert {size for size in TABLES[0].sizes if size[0] <= size[1]} == {
        (512, 512), (448, 576), (384, 640), (320, 704), (320, 768), (256, 832), (256, 896), (256, 960), (256, 1024)
    }  # fmt: skip
    assert TABLES[4].sizes == [(64, 64)]


@pytest.mark.parametrize("buckets", TABLES)
def test_a_picture_gets_the_nearest_bucket_that_it_can_fill(buckets: Buckets) -> None:
    too_small = smaller = 0
    for width, height in pictures():
        if enlargement((buckets.step, buckets.step), width, height) > buckets.max_upscale:
            too_small += 1
            with pytest.raises(ImageError, match=rf"{width} × {height} is too small.*--max_upscale"):
                buckets.size_for(width, height)
            continue
        size = buckets.size_for(width, height)
        assert buckets.size_for(height, width) == size[::-1]
        assert size[0] % buckets.step == size[1] % buckets.step == 0
        assert size[0] * size[1] <= buckets.resolution**2
        assert enlargement(size, width, height) <= buckets.max_upscale * (1 + 1e-12)
        fitting = [s for s in buckets.sizes if enlargement(s, width, height) <= buckets.max_upscale]
        if fitting:
            nearest = min(aspect_distance(s, width, height) for s in fitting)
            assert size in buckets.sizes
            assert aspect_distance(size, width, height) == pytest.approx(nearest, abs=1e-9)
        else:
            smaller += 1
            # It is of the largest table that has one which the picture can fill.
            sides = range(buckets.resolution, buckets.step - 1, -buckets.step)
            tables = [Buckets(side, buckets.step, 1.0).sizes for side in sides]
            usable = [any(enlargement(s, width, height) <= buckets.max_upscale for s in table) for table in tables]
            assert size in tables[usable.index(True)]
    assert too_small > 10
    assert smaller > 10 or len(buckets.sizes) == 1


def test_large_pictures_lose_little() -> None:
    for width, height in ((4000, 3000), (1920, 1080), (3000, 4000), (800, 800)):
        assert math.exp(aspect_distance(TABLES[1].size_for(width, height), width, height)) < 1.06


def test_squares_get_squares() -> None:
    assert TABLES[0].size_for(4000, 4000) == (512, 512)
    assert TABLES[0].size_for(256, 256) == (512, 512)
    assert TABLES[0].size_for(255, 255) == (448, 448)
    assert TABLES[0].size_for(32, 32) == (64, 64)
    assert Buckets(500, 64, 1.0).size_for(4000, 4000) == (448, 448)


def test_a_step_over_the_resolution_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match="--bucket_step 64 is over --resolution 32"):
        Buckets(32, 64, 2.0)
