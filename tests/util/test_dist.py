"""Several processes: what rank 0 alone does, and how they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.processes import in_processes, meeting_place, rank_variables
from util.dist import Dist
from util.errors import UserError


def take_long(folder: Path, dist: Dist) -> None:
    def wait() -> list[int]:
        threading.Event().wait(2.5)
        return [dist.rank]

    def fail() -> None:
        raise UserError("no such file")

    assert dist.on_main(wait) == [0]
    with pytest.raises(UserError, match="no such file"):
        dist.on_main(fail)
    assert dist.on_main(lambda: dist.rank) == 0
    (folder / str(dist.rank)).touch()


@pytest.mark.slow
def test_rank_0_may_take_longer_than_a_collective_and_its_error_reaches_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others would be ended by the time limit, or wait in a barrier for a process that has left.

    They wait in silence: torch logs each wait that runs out.
    """
    in_processes(2, partial(take_long, tmp_path), timeout=timedelta(seconds=1))
    assert "timed out" not in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


LEAVE = """
import os, sys
from util.dist import distributed
with distributed("cpu") as dist:
    import torch._dynamo
    dist.gather(dist.rank)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]  # garbage that only the collector finds
    del model
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
sys.exit(any("gloo" in name for name in names))
"""


@pytest.mark.slow
def test_no_thread_of_the_group_outlives_it() -> None:
    """One that still held a tensor when Python ended aborted the program, now and then, after all work was done."""
    with meeting_place(2) as variables:
        started = [
            subprocess.Popen([sys.executable, "-c", LEAVE], cwd=ROOT, env=os.environ | variables | rank_variables(rank))
            for rank in range(2)
        ]
        assert [process.wait(60) for process in started] == [0, 0]


def test_one_process_just_runs_it() -> None:
    assert Dist(0, 1, None).on_main(lambda: 3) == 3  # type: ignore[arg-type]
