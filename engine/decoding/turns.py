"""Order among calls that share memory, whatever threads and streams they come from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch


class Turns:
    """One call at a time: host threads wait for each other, streams of the device do so without the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    @contextlib.contextmanager
    def take(self) -> Iterator[torch.cuda.Stream | None]:
        """Work enqueued here on the current stream, which is given, runs behind that of the turn before."""
        with self._lock:
            if self._done is None:
                yield None
                return
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._done)
            try:
                yield stream
            finally:
                self._done.record(stream)


class GraphTurns(Turns):
    """Turns of all CUDA graphs of a GPU.

    They are captured on one stream: the matrix library keeps a workspace for each stream that it has seen (33 MiB on an
    H200), for as long as the process lives. So the graphs share that workspace, and no two may run at once.
    """

    _of_device: dict[torch.device, GraphTurns] = {}  # noqa: RUF012 - the one of each GPU

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.capture_stream = torch.cuda.Stream(device)

    @classmethod
    def of(cls, device: torch.device) -> GraphTurns:
        return cls._of_device.get(device) or cls._of_device.setdefault(device, cls(device))
