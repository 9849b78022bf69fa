"""Processes and devices: everything the project knows about torch.distributed.

A program started by ``torchrun`` finds its rank in the environment; started plainly it is the only process and every
function here still works.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist

from util.config import setting
from util.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # of a collective; rank 0 does what takes longer in Dist.on_main
_calls = itertools.count()  # of on_main, the same in all processes


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where a command computes."""

    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class Dist:
    """One process's place in the run: its global ``rank`` among ``world_size`` processes and its ``device``."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            torch_dist.barrier()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all processes, in place; returns it."""
        if self.world_size > 1:
            torch_dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every process's ``value`` in rank order, on every process. For small plain objects, not tensors."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        torch_dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value`` on every process. For small plain objects."""
        return self.gather(value)[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0; every process gets its result (a small plain object) or its UserError.

        The others wait outside any collective, which has a time limit, so ``function`` may take hours.
        """
        if self.world_size == 1:
            return function()
        key = f"on_main: {next(_calls)}"
        result, message = None, None
        if self.is_main:
            try:
                result = function()
            except UserError as error:
                message = str(error)
            _connect().set(key, "done")
        else:
            _wait_for(key)
        result, message = self.broadcast((result, message))
        if message is not None:
            raise UserError(message)
        return result  # type: ignore[return-value]


def resolve_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``; UserError for others, or a missing GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise UserError(f"the device {name!r} can't be used; name auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise UserError(f"the device {name!r} is one GPU for several processes; name cuda.")
        # A launcher may leave a single visible GPU per process while LOCAL_RANK keeps counting.
        index = device.index if device.index is not None else (0 if count == 1 else local_rank)
        if index >= count:
            raise UserError(f"the device {name!r} is GPU {index}, but only {count} are visible.")
        device = torch.device("cuda", index)
    return device


def _connect(timeout: timedelta = timedelta(minutes=5)) -> torch_dist.Store:
    """The store in which the processes of a run find each other; torchrun keeps it when it restarts them."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch_dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return torch_dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _wait_for(key: str) -> None:
    store, pause = _connect(), 0.01
    while not store.check([key]):  # torch logs every wait of the store's own that runs out
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def said_already(line: str) -> bool:
    """Whether another process of this run has asked about the same line; False where the store can't be reached."""
    try:
        return _connect(timedelta(seconds=5)).add(f"said: {line}", 1) > 1
    except (KeyError, ValueError, RuntimeError):
        return False


@contextlib.contextmanager
def distributed(device: str = "auto") -> Iterator[Dist]:
    """Join the process group that ``torchrun`` describes (none when started plainly) and leave it at the end.

    nccl for GPUs, gloo for CPUs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    resolved = resolve_device(device, local_rank)
    cuda = resolved.type == "cuda"
    if cuda:
        torch.cuda.set_device(resolved)
    if world_size > 1:
        # Torch imports it sooner or later, and it would keep a group that is there already.
        importlib.import_module("torch._dynamo")
        torch_dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=resolved if cuda else None)
    yield Dist(rank, world_size, resolved)
    # Not after an exception: leaving waits for the other processes, which may be in a collective. torchrun ends them.
    if world_size > 1:
        gc.collect()  # a model of DDP keeps the group too; its threads must not outlive it, or they abort the program
        torch_dist.destroy_process_group()
