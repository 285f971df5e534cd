"""The processes that look at images: created before the data are opened; results come in the rows' order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from sd_recipes.errors import RecipeError
from sd_recipes.inspection.image_checks import ImageSettings, InspectedImages, get_ready, inspect_images

CHUNKS_AHEAD = 3  # per worker, so that it never waits for the next one

Images = list[tuple[int, dict[str, Any] | None]]  # (row's number, {"bytes", "path"})


class ImageWorkers:
    """`inspect_images` in `number` processes; with 0, in this one."""

    def __init__(self, number: int) -> None:
        self.number = number
        if number:
            # Fresh processes: a fork would take over the locks of torch's and the tokenizer's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(number, mp_context=context, initializer=get_ready)
            for _ in range(number):  # each call starts one
                self._pool.submit(get_ready)

    def inspect(
        self, chunks: Iterable[tuple[Any, Images]], settings: ImageSettings
    ) -> Iterator[tuple[Any, InspectedImages]]:
        """For each chunk of (what belongs to it, images), the former and what `inspect_images` finds, in order.

        Only a bounded number of chunks is in flight. Raises RecipeError if a process dies.
        """
        if not self.number:
            for owner, images in chunks:
                yield owner, inspect_images(images, settings)
            return
        waiting: deque[tuple[Any, Future[InspectedImages]]] = deque()
        try:
            for owner, images in chunks:
                waiting.append((owner, self._pool.submit(inspect_images, images, settings)))
                if len(waiting) > CHUNKS_AHEAD * self.number:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        except BrokenProcessPool:
            raise RecipeError(
                f"--num_workers {self.number}: a worker process was killed, probably for lack of memory: use fewer, "
                "or lower --max_image_megapixels"
            ) from None

    def close(self) -> None:
        if self.number:
            self._pool.shutdown(cancel_futures=True)
