"""Outputs: tried before work, whole or not there, nothing left over from killed processes."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.helpers.commands import ROOT
from util.errors import UserError, reading
from util.files import atomic_write, check_output_dir, check_output_file, refuse_link, sha256


def test_good_outputs_pass_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    check_output_dir(tmp_path)
    check_output_dir(tmp_path / "a" / "b")
    check_output_file(tmp_path / "a" / "new.json")
    check_output_file(tmp_path / "old.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "old")]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/proc/none/here", "no file can be made there"),
        ("/sys/here", "no file can be made there"),
        ("/dev/null/here", "/dev/null is no folder"),
        ("file/here", "is a file"),
        ("n" * 300, "a name in it is too long"),
        ("d/" * 3000 + "x", "the path is too long"),
        ("loop/here", "is no folder"),
    ],
)
def test_outputs_that_cannot_be_written_are_named(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for check in (check_output_dir, check_output_file):
        with pytest.raises(UserError, match=f"can't be used: .*{reason}"):
            check(tmp_path / path)
    with pytest.raises(UserError, match="it is a folder"):
        check_output_file(tmp_path)
    with pytest.raises(UserError, match="it is not a file"):
        check_output_file(Path("/dev/null"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_forbidden_folders_are_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_output_dir(tmp_path)


def test_links_are_refused(tmp_path: Path) -> None:
    refuse_link(tmp_path)
    refuse_link(tmp_path / "none")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link is a symbolic link"):
        refuse_link(tmp_path / "link")


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Guards against files that pile up, and against removing what another process is writing, or someone else's."""
    path = tmp_path / "a[1].json"
    code = (
        "import os, sys; from pathlib import Path; from util.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file: os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, path], cwd=ROOT)
    host = socket.gethostname()
    kept = [f".b.json.{host}.999999999.tmp", ".a[1].json.elsewhere.999999999.tmp", ".a[1].json.old.tmp"]
    for name in kept:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 4
    with atomic_write(path) as first, atomic_write(tmp_path / "c"):
        first.write(b"1")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["a[1].json", "c", *kept])


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against "unexpected pos", by which torch hides it."""

    def save(value: object, file: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as torch does

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "a.pt") as file:
        torch.save({}, file)
    assert not list(tmp_path.iterdir())
    (tmp_path / "whole.json").touch()
    with pytest.raises(OSError, match="No space left"), reading("file", tmp_path / "whole.json"):
        raise OSError(errno.ENOSPC, "No space left on device")  # of what is written from it


def test_what_another_file_fails_with_is_not_blamed_on_the_one_that_is_read(tmp_path: Path) -> None:
    """Guards against results that are called damaged because a picture made from them can't be written."""
    whole, other = tmp_path / "whole.json", tmp_path / "folder"
    whole.touch()
    other.mkdir()
    with pytest.raises(IsADirectoryError) as failed, reading("file", whole):
        other.write_text("")
    assert failed.value.filename == str(other)
    with pytest.raises(UserError, match=r"file .*whole\.json is truncated"), reading("file", whole):
        os.readlink(whole)  # an OSError of the file itself


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "whole.json"
    path.touch()

    def refuse(*_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    refused = pytest.raises(UserError, match=r"file .*whole\.json can't be read: Permission denied\.")
    with refused, reading("file", path):
        refuse()
    monkeypatch.setattr(os, "stat", refuse)  # its folder may not be entered
    with refused, reading("file", path):
        pass


def test_a_file_that_can_be_opened_but_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/proc/self/mem can't be read: Input/output error"):
        sha256("/proc/self/mem")
    with pytest.raises(UserError, match="is not a file"):
        sha256(tmp_path)
