"""Writing files so that a reader never sees a part of one; their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from util.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` only when the block ends without an exception.

    A reader sees the old file or the new one, never a part; after a crash or a full disk the old one is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(path: Path) -> Path:
    """Name beside ``path``, of this process, for what is about to take its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes were writing; for the one that has the folder to itself."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            with contextlib.suppress(OSError):  # a folder that can only be read
                path.unlink()


def check_output_dir(path: Path) -> None:
    """Raise UserError unless `path` is a folder that can be written to or can be made. Makes nothing."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"the output folder {path} can't be used: {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"the output folder {path} can't be used: no permission to write to {existing}.")


def refuse_link(path: Path) -> None:
    """Raise UserError if ``path`` is a symbolic link: what is replaced and deleted there would be elsewhere."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which can't be written through; remove it.")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes. UserError if there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist or is not a file.")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(values: dict[str, Any], key: str) -> str:
    """Hex SHA-256 of a JSON object without the ``key`` that records it; blanks and the order of keys do not matter."""
    rest = {name: value for name, value in values.items() if name != key}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
