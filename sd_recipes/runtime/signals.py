"""Signals that ask a run to end: noted when they arrive, acted on where everything can be saved.

A launcher may die from the signal and leave its processes behind, as `accelerate launch` does with one
process, and torchrun on SIGUSR1. So the end of the launcher counts as such a request too.
This module imports no torch, so that signals are noted from the start.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sd_recipes.errors import RunError

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# Set by `accelerate launch` and by torchrun for the processes that they start.
LAUNCHERS_VARIABLES = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
WATCH_SECONDS = 0.5
# A terminal sends Ctrl-C to all its processes, and a launcher may pass it on: within this time they count as one.
SAME_INTERRUPT_SECONDS = 0.5


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Stopped(RunError):
    """The run was asked to end, and did so where it can be resumed."""

    status = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry later"


class StopRequest:
    """Whether this process was asked to end, and by what."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.resume_command = "the same command"
        self._interrupted: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context `listen`; afterwards signals do what they did before, for a notebook's next cell.

        Python leaves signals to the main thread. In another one, only the end of the launcher is noted.
        """
        self.reason, self.resume_command, self._interrupted = None, "the same command", None
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                # None is a handler that was not set from Python.
                if handler is not None and in_main_thread():
                    signal.signal(number, handler)

    def listen(self) -> None:
        """Note SIGTERM, SIGINT, SIGUSR1 and the end of the launcher; a second SIGINT ends the process at once.

        A signal that this process was started to ignore, such as SIGINT in a shell's background job, stays ignored.
        """
        process = os.getpid()

        def note(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a forked loader worker: it ends with its parent
                return
            now = time.monotonic()
            if number == signal.SIGINT and self._interrupted and now > self._interrupted + SAME_INTERRUPT_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(process, signal.SIGINT)
            if number == signal.SIGINT and self._interrupted is None:
                self._interrupted = now
                if os.environ.get("RANK", "0") == "0":  # not by print(), which may be interrupted mid-line
                    os.write(2, b"\nStopping where everything can be saved; Ctrl-C again to leave at once.\n")
            self.reason = self.reason or signal.Signals(number).name

        if in_main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, note)
        else:
            logger.warning(
                "This run is not in the program's main thread, and no signal can ask it to stop: if the program ends, "
                "what was trained since the last checkpoint is lost. --checkpointing_minutes 10 keeps that short."
            )
        if any(variable in os.environ for variable in LAUNCHERS_VARIABLES):
            threading.Thread(target=self._watch, args=(os.getppid(),), name="launcher", daemon=True).start()

    def _watch(self, launcher: int) -> None:
        while os.getppid() == launcher:
            time.sleep(WATCH_SECONDS)
        self.reason = self.reason or "the end of its launcher"

    def check(self, where: str) -> None:
        """Raise Stopped if this process was asked to end."""
        if self.reason:
            raise self.stopped(where)

    def stopped(self, where: str) -> Stopped:
        """The exception that says why the run ends, where it stands, and how to resume it."""
        reason = self.reason or "a signal to another process"
        return Stopped(f"stopped by {reason}: {where}; {self.resume_command} resumes from there")


def outlive_signals(worker: int) -> None:
    """Let a loader worker outlive signals: the run needs its batches to finish the step.

    Terminals, schedulers and service managers signal all processes of a group. Only a second SIGTERM ends the
    worker, since that is how torch ends one that hangs.
    """

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, ignore_once if number == signal.SIGTERM else signal.SIG_IGN)


# Signals belong to the process: there is one request.
stop_request = StopRequest()
