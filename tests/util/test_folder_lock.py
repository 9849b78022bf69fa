"""One process per folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.helpers.processes import holder
from util.errors import UserError
from util.files import atomic_write
from util.folder_lock import LOCK_FILE, FolderLock


def test_a_folder_is_held_until_its_process_dies(tmp_path: Path) -> None:
    """Two trainings in one folder would write over each other's checkpoints; a killed one must not leave it locked."""
    with holder(tmp_path) as process:
        with FolderLock(tmp_path) as lock, pytest.raises(UserError, match="another process is writing to"):
            lock.acquire()
        assert (tmp_path / LOCK_FILE).exists()  # a refusal does not free the folder
        process.kill()
    with FolderLock(tmp_path) as lock:
        lock.acquire()


def test_nothing_of_it_is_left(tmp_path: Path) -> None:
    """A command that is refused later on must not leave a folder; what was there, or came into it, stays."""
    new, there, used = tmp_path / "new", tmp_path / "there", tmp_path / "used"
    there.mkdir()
    for folder in (new, there, used):
        with FolderLock(folder) as lock:
            lock.acquire()
            if folder == used:
                (folder / "results.json").touch()
    assert sorted(tmp_path.rglob("*")) == [there, used, used / "results.json"]


def test_what_killed_processes_were_writing_is_removed(tmp_path: Path) -> None:
    """Each kill would leave a file, of the size of a checkpoint for one; files of other names are not ours."""
    with contextlib.suppress(KeyboardInterrupt), atomic_write(tmp_path / "metrics.jsonl") as file:
        file.write(b"half")
        (left,) = tmp_path.iterdir()
        left.with_name(left.name.replace(str(os.getpid()), "1")).write_bytes(b"half")
        raise KeyboardInterrupt
    others = {".notes.tmp", "a.1.tmp", ".b.1.tmp.txt"}
    for name in others:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 4
    with FolderLock(tmp_path) as lock:
        lock.acquire()
    assert {path.name for path in tmp_path.iterdir()} == others


def test_a_lock_whose_file_was_just_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against two holders: of the file that a process removed at its end, and of the one made after it."""
    original = FolderLock._lock
    removals = iter([True, False])

    def removed_before(lock: FolderLock, file: int) -> None:
        if next(removals):
            (tmp_path / LOCK_FILE).unlink()
        original(lock, file)

    monkeypatch.setattr(FolderLock, "_lock", removed_before)
    with FolderLock(tmp_path) as lock:
        lock.acquire()
        assert (tmp_path / LOCK_FILE).exists()
        assert next(removals, None) is None


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_in_its_place_is_refused(tmp_path: Path, target: str) -> None:
    """Guards against two holders where the lock can't be taken, and against a lock on someone else's file."""
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / target)
    with FolderLock(tmp_path) as lock, pytest.raises(UserError, match=r"\.lock can't be made"):
        lock.acquire()
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with FolderLock(tmp_path / "out") as lock, pytest.raises(UserError, match=r"out can't be made"):
        lock.acquire()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("util.folder_lock.fcntl.lockf", no_locks)
    unfinished, held = tmp_path / ".results.json.1.tmp", tmp_path / ".lock"
    unfinished.touch()
    held.touch()
    with FolderLock(tmp_path) as lock:
        lock.acquire()
    assert "No locks available" in caplog.text
    assert unfinished.exists()  # what may be another process's is left alone
    assert held.exists()
