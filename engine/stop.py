"""Leaving when told to: which signals ask for it, how several processes agree on a step, and the exit statuses."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Iterator
from types import FrameType

import torch

from util.dist import Dist

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_STATUS = os.EX_TEMPFAIL  # 75: everything is saved, the same command goes on
READ_BACK_DELAY = 2  # steps after which a GPU's answer is read, so that nobody waits for the device


def exit_status(number: int) -> int:
    """Exit status of a run that a signal stopped after saving: 130 for Ctrl-C, else the one that asks to requeue."""
    return 128 + signal.SIGINT if number == signal.SIGINT else REQUEUE_STATUS


@contextlib.contextmanager
def exit_when_told() -> Iterator[None]:
    """Let a stop signal end the program at once with its exit status, where there is nothing to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(exit_status(number))

    previous = {number: signal.signal(number, leave) for number in STOP_SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """The stop signals ask the loop to finish its step and save; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            logger.info("%s: finishing this step, then saving", signal.Signals(number).name)
            self.signal = number

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let signals act as before, while something runs that can be interrupted at any time."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def agreed(self, dist: Dist) -> bool:
        """Whether to stop after this step: the same answer in all processes, which call this once per step.

        On GPUs the answer is that of two steps before, so that the host never waits for the step it has just started.
        """
        if dist.world_size == 1:
            return self.signal is not None
        told = dist.sum_(torch.full((), float(self.signal is not None), device=dist.device))
        if dist.device.type != "cuda":
            return told.item() > 0
        answer = torch.empty((), pin_memory=True).copy_(told, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((event, answer))
        if len(self._pending) <= READ_BACK_DELAY:
            return False
        event, answer = self._pending.popleft()
        event.synchronize()
        return answer.item() > 0


def ignore_stop_signals(worker: int) -> None:
    """For processes that load data: a launcher signals its whole group; loading goes on until the step is finished."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
