"""What users see on the console: our messages and the progress bar, and only errors from libraries."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sd_recipes.errors import RunError, one_line
from sd_recipes.redaction import redacted
from sd_recipes.runtime.signals import Stopped


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Print a RunError in one line and exit with its status; on every process, since only one meets a broken row."""
    try:
        yield
    except Stopped as stop:
        words, status = str(stop) if is_main_process() else "", stop.status
    except RunError as error:
        words, status = f"error: {error}", error.status
    except KeyboardInterrupt:
        words, status = "stopped", 130
    except RuntimeError as error:
        told = _lost_another_process(error)
        if told is None:
            raise
        words, status = f"error: {told} ({redacted(one_line(error, 200))})", 1
    else:
        return
    if words:
        print(words, file=sys.stderr, flush=True)
    sys.exit(status)


def speak_utf8() -> None:
    """Start this program again in Python's UTF-8 mode, if its locale has another encoding for file names.

    There the names in a metadata file would not be those on the disk, and flags would arrive in pieces. To be called
    first, since nothing is kept; not by someone else's program, such as a notebook.
    """
    if not has_utf8():
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def has_utf8() -> bool:
    return sys.getfilesystemencoding().replace("-", "").lower() == "utf8"


def print_anything() -> None:
    """Let the console take every text: what its encoding lacks is escaped.

    A file name or a caption must not end a run. Other programs' consoles, such as a notebook's, take all there is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(words: str) -> None:
    """Print a message for the user, without secrets."""
    print(redacted(words), flush=True)


def _lost_another_process(error: RuntimeError) -> str | None:
    """The meaning of an error that torch raises where processes wait for each other; None for any other error."""
    text = str(error)
    if "gloo" in text and "peer" in text:
        return "another process has ended (it says why) or cannot be reached"
    # By name, since torch is not imported here. It also raises them for whatever else goes wrong between devices.
    of_torch = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    if of_torch or re.search(r"(?is)(?=.*(gloo|nccl)).*(timeout|timed out|watchdog)", text):
        return "this process and the others cannot continue: one has ended (it says why), hangs, or cannot be reached"
    return None


class RedactedRecord(logging.LogRecord):
    """A log record without secrets, from any logger, a library's included."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = _traceback(self.exc_info[1])

    def getMessage(self) -> str:
        return redacted(super().getMessage())


def _traceback(error: BaseException | None) -> str:
    return redacted("".join(traceback.format_exception(error))).rstrip("\n")


def _tell_unforeseen(kind: object, error: BaseException, place: object) -> None:
    print(_traceback(error), file=sys.stderr, flush=True)


def _tell_unforeseen_of_thread(told: threading.ExceptHookArgs) -> None:
    if told.exc_type is not SystemExit:
        print(
            f"In thread {told.thread and told.thread.name}:\n{_traceback(told.exc_value)}", file=sys.stderr, flush=True
        )


def is_main_process() -> bool:
    """Read from the environment that the launcher sets, so that it is known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def set_up_console() -> None:
    """Set up logging, before torch and diffusers are imported, since they log during import.

    The main process shows our information and everyone's warnings, the others only errors.
    """
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    # Tokenizers are used in the loader's threads and forked workers, where their own threads would only warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    is_main = is_main_process()
    logging.setLogRecordFactory(RedactedRecord)
    sys.excepthook, threading.excepthook = _tell_unforeseen, _tell_unforeseen_of_thread
    logging.basicConfig(
        format="%(levelname)s %(name)s: %(message)s",
        level=logging.WARNING if is_main else logging.ERROR,
        stream=sys.stderr,
    )
    logging.getLogger("sd_recipes").setLevel(logging.INFO if is_main else logging.ERROR)
    # Any one process may meet a bad row, or run out of memory.
    for name in ("data.bad_rows", "runtime.out_of_memory"):
        logging.getLogger(f"sd_recipes.{name}").setLevel(logging.WARNING)
    # On import it warns about an optional kernel for 4-bit inference, which is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def hide_library_bars() -> None:
    """Hide the libraries' loading and saving bars, which would break up the training bar."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
