"""Several processes: what rank 0 alone does, and one training per folder."""

from __future__ import annotations

import subprocess
import sys
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.processes import in_processes
from util.dist import Dist
from util.errors import UserError
from util.folder_lock import FolderLock


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
def test_rank_0_may_take_longer_than_a_collective_and_its_error_reaches_all(tmp_path: Path) -> None:
    """The others would be ended by the time limit, or wait in a barrier for a process that has left."""
    in_processes(2, partial(take_long, tmp_path), timeout=timedelta(seconds=1))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_one_process_just_runs_it() -> None:
    assert Dist(0, 1, None).on_main(lambda: 3) == 3  # type: ignore[arg-type]


HOLD = """
import sys
from pathlib import Path
from util.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1]), "training") as lock:
    lock.acquire()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_dies(tmp_path: Path) -> None:
    """Two trainings in one folder would write over each other's checkpoints; a killed one must not leave it locked."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with FolderLock(tmp_path, "training") as lock, pytest.raises(UserError, match="another training"):
        lock.acquire()
    holder.kill()
    holder.communicate()
    with FolderLock(tmp_path, "training") as lock:
        lock.acquire()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("util.folder_lock.fcntl.lockf", no_locks)
    with FolderLock(tmp_path, "training") as lock:
        lock.acquire()
    assert "No locks available" in caplog.text
