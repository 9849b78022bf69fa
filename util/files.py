"""Writing files so that a reader never sees a part of one; their hashes."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from util.errors import UserError, reading, reason_of


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` only when the block ends without an exception.

    A reader sees the old file or the new one, never a part; after a crash or a full disk the old one is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    _remove_leftovers(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # a full disk, which torch.save hides behind "unexpected pos"
        raise


def temporary_name(path: Path) -> Path:
    """Name beside ``path``, of this process, for what is about to take its place."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())[:32]


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine were about to put in the place of ``path``."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.{_host()}.*.tmp"):
        pid = other.name.split(".")[-2]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            other.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes were writing; for the one that has the folder to itself."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            with contextlib.suppress(OSError):  # a folder that can only be read
                path.unlink()


def check_output_dir(path: Path) -> None:
    """Raise UserError unless ``path`` is a folder that can be written to or can be made; for use before long work.

    What decides is trying: a file is made there, or where the folder will be, and removed at once.
    """
    _check_output(path / "checkpoint-last-1.json", f"the output folder {path}")  # as long as names get


def check_output_file(path: Path) -> None:
    """Raise UserError unless ``path`` can be written, its folder made where it is missing; otherwise as above."""
    if os.path.isdir(path):
        raise UserError(f"the output file {path} can't be written: it is a folder.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"the output file {path} can't be written: it is not a file.")
    _check_output(path, f"the output file {path}")


def _check_output(file: Path, named: str) -> None:
    try:
        folder = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
        if not folder.is_dir():
            raise UserError(f"{named} can't be used: {folder} is {'a file' if folder.is_file() else 'no folder'}.")
        longest = os.pathconf(folder, "PC_NAME_MAX")
        for name in (*file.absolute().relative_to(folder).parts[:-1], temporary_name(file).name):
            if len(os.fsencode(name)) > longest:
                raise UserError(f"{named} can't be used: a name in it is too long.")
        if len(os.fsencode(temporary_name(file).absolute())) >= os.pathconf(folder, "PC_PATH_MAX"):
            raise UserError(f"{named} can't be used: the path is too long.")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"{named} can't be used: no file can be made there ({reason}).") from None


def refuse_link(path: Path) -> None:
    """Raise UserError if ``path`` is a symbolic link: what is replaced and deleted there would be elsewhere."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which can't be written through; remove it.")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes. UserError if there is no such file, or it can't be read."""
    with reading("file", path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(values: dict[str, Any], key: str) -> str:
    """Hex SHA-256 of a JSON object without the ``key`` that records it; blanks and the order of keys do not matter."""
    rest = {name: value for name, value in values.items() if name != key}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
