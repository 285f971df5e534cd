"""What a person sees on the console: our words and the bar, from libraries only errors."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sd_recipes.recipe import RunError
from sd_recipes.signals import Stopped


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Tell a RunError in one line, on every process: a broken row is met by one only. Leave with its status."""
    try:
        yield
    except Stopped as stop:
        words, status = str(stop) if is_main_process() else "", stop.status
    except RunError as error:
        words, status = f"error: {error}", error.status
    except KeyboardInterrupt:
        words, status = "stopped", 130
    except RuntimeError as error:
        if "peer" not in str(error) or "gloo" not in str(error):
            raise
        cause = " ".join(str(error).split())[:200]
        words, status = f"error: another process has ended, and says why, or cannot be reached ({cause})", 1
    else:
        return
    if words:
        print(words, file=sys.stderr, flush=True)
    sys.exit(status)


def is_main_process() -> bool:
    """By the environment that the launcher gave, so before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def set_up_console() -> None:
    """Set up logging; before torch and diffusers are imported, since they speak while they are.

    On the main process our information and everybody's warnings are shown, on the others errors only.
    """
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    # Tokenizers are used in the loader's threads and forked workers, where their own threads would only warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    is_main = is_main_process()
    logging.basicConfig(
        format="%(levelname)s %(name)s: %(message)s",
        level=logging.WARNING if is_main else logging.ERROR,
        stream=sys.stderr,
    )
    logging.getLogger("sd_recipes").setLevel(logging.INFO if is_main else logging.ERROR)
    # A bad row is met by one process, whichever that is.
    logging.getLogger("sd_recipes.data.bad_rows").setLevel(logging.WARNING)
    # At import it warns of an optional kernel for 4-bit inference, which is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def hide_library_bars() -> None:
    """Loading and saving bars of the libraries would break up the training bar; after they are imported."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
