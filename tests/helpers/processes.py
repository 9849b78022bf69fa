"""Several processes that compute together, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

import util.dist
from tests.helpers.commands import ROOT
from util.dist import Dist, distributed

ALONE = Dist(0, 1, torch.device("cpu"))

HOLD = """
import sys
from pathlib import Path
from util.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])) as lock:
    lock.acquire()
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the folder until its input is closed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


@contextlib.contextmanager
def meeting_place(world_size: int) -> Iterator[dict[str, str]]:
    """Environment variables by which `world_size` processes find each other, except for their ranks.

    The store in which they meet is held here, on a port that the system chose for it: a port that is only looked up
    and given to rank 0 may belong to another program by the time rank 0 has started.
    """
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 joins the store too, instead of opening one
    }


def rank_variables(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def in_processes(world_size: int, work: Callable[[Dist], None], timeout: timedelta = util.dist.TIMEOUT) -> None:
    """Call ``work``, which can be pickled, in new processes on the CPU; raises what one of them raises.

    Args:
        timeout: of a collective.
    """
    with meeting_place(world_size) as variables:
        mp.spawn(_join, (variables, timeout, work), nprocs=world_size)


def _join(rank: int, variables: dict[str, str], timeout: timedelta, work: Callable[[Dist], None]) -> None:
    os.environ.update(variables | rank_variables(rank))
    torch.set_num_threads(1)
    util.dist.TIMEOUT = timeout
    with distributed("cpu") as dist:
        work(dist)
