"""train_text_to_image.py, whose first process takes longer over what it does alone than devices wait for each other.

That is a default group with a time-out of SHORT seconds, as NCCL's is one of minutes; each of the first process's
own works takes LONG, once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import distributed

SHORT, LONG = 4.0, 6.0


def slowly(work: Callable[..., Any]) -> Callable[..., Any]:
    done = False

    def slow_work(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        if os.environ["RANK"] == "0" and not done:
            done = True
            print(f"{getattr(work, '__qualname__', work)} takes long", flush=True)
            time.sleep(LONG)
        return work(*arguments, **options)

    return slow_work


def main() -> None:
    from sd_recipes.checkpoints import resume, run_folder
    from sd_recipes.checkpoints import saver as saving
    from sd_recipes.commands import train as run
    from sd_recipes.commands.cli import train
    from sd_recipes.evaluation import validation
    from sd_recipes.model.stable_diffusion import StableDiffusion

    start = run.start_accelerator

    def start_impatiently(*arguments: Any) -> Any:
        accelerator = start(*arguments)
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=SHORT))
        return accelerator

    run.start_accelerator = start_impatiently
    for place, name in (
        (run_folder, "_prepare"),
        (resume, "data_fingerprint"),
        (StableDiffusion, "load"),
        (validation.Validator, "__call__"),
        (saving.BackgroundSaver, "wait"),
        (run, "write_results"),
    ):
        setattr(place, name, slowly(getattr(place, name)))
    train()


if __name__ == "__main__":
    main()
