"""Stop signals ask a program to save and exit: which ones they are, how a loop notices them, the exit statuses."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_STATUS = os.EX_TEMPFAIL  # 75: everything is saved, the same command resumes
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def exit_status(number: int) -> int:
    """Exit status of a run that a signal stopped after saving: 130 for Ctrl-C, else 75, which asks to be restarted."""
    return 128 + signal.SIGINT if number == signal.SIGINT else REQUEUE_STATUS


class StopSignal:
    """In a `with` block: the first stop signal is kept in `signal` for the loop to see; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            # In the middle of a progress bar's writing nothing else can be written.
            with contextlib.suppress(RuntimeError):
                logger.info("%s: finishing this step, then saving", signal.Signals(number).name)

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Give signals their earlier handlers, while something runs that can be interrupted at any time."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


@contextlib.contextmanager
def pass_on_stop_signals(child: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Pass stop signals on to a child process instead of ending; gives the list of those that came.

    Ctrl-C is left as it is: a terminal sends it to both, and a second one would interrupt a child that saves.
    """
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS if number != signal.SIGINT}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int) -> None:
    """For processes that load data: a launcher signals all of them, but the step under way still needs its batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Have Linux kill this process when the one that started it is gone, however that one ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
