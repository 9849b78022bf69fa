"""What a device can do at its best, measured the same way for every benchmark."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch


class Marks:
    """Moments on the clock of the device; taking one does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.moments: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each moment and the next."""
        pairs = itertools.pairwise(self.moments)
        if not self.cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the fastest of several."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    marks = Marks(device)
    for _ in range(21):
        marks.mark()
        left @ right
    marks.mark()
    return 2 * side**3 / min(marks.seconds()[5:])


def copy_bytes(device: torch.device) -> float:
    """Bytes read and written per second by a copy within the device's memory: the fastest of several."""
    source = torch.empty(2**31 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    marks = Marks(device)
    for _ in range(11):
        marks.mark()
        target.copy_(source)
    marks.mark()
    return 2 * len(source) / min(marks.seconds()[2:])
