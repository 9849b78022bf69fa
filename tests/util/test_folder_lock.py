"""One training per folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from util.errors import UserError
from util.folder_lock import FolderLock

HOLD = """
import sys
from pathlib import Path
from util.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])) as lock:
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
    with FolderLock(tmp_path) as lock, pytest.raises(UserError, match="another training"):
        lock.acquire()
    holder.kill()
    holder.communicate()
    with FolderLock(tmp_path) as lock:
        lock.acquire()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("util.folder_lock.fcntl.lockf", no_locks)
    with FolderLock(tmp_path) as lock:
        lock.acquire()
    assert "No locks available" in caplog.text
