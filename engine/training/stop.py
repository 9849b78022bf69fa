"""Leaving when told to, for programs of several processes: how they agree on the step. The signals: util/signals.py."""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Iterator
from types import FrameType

import torch

from util.dist import Dist
from util.signals import STOP_SIGNALS, StopSignal, exit_status

READ_BACK_DELAY = 2  # steps after which a GPU's answer is read, so that nobody waits for the device


@contextlib.contextmanager
def exit_when_told() -> Iterator[None]:
    """Let a stop signal end the program at once with its exit status, where there is nothing to save.

    Those that follow are ignored until the block is left, so that what is put in order there is not interrupted:
    ``timeout`` and launchers send theirs twice. What hangs there ends with SIGKILL only.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        for other in previous:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(exit_status(number))

    previous = {number: signal.signal(number, leave) for number in STOP_SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest(StopSignal):
    """The stop signals of all processes ask their loop to finish its step and save."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def __enter__(self) -> StopRequest:
        super().__enter__()
        return self

    @contextlib.contextmanager
    def suspended(self, told: int | None = None) -> Iterator[None]:
        """As in StopSignal; a signal that came already acts at once, and so does `told`, which another process got."""
        with super().suspended():
            if number := self.signal or told:
                signal.raise_signal(number)
            yield

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
