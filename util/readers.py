"""Reading files from outside: JSON, JSON lines and NumPy's arrays, whatever is in them, in bounded memory."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from util.errors import UserError, reading

logger = logging.getLogger(__name__)

MAX_TEXT = 2**27  # bytes; no file that is read whole comes near it


def read_text(what: str, path: str | Path) -> str:
    """The text of a file in UTF-8. UserError, with ``what`` the file is, if there is none or it is something else."""
    with reading(what, path):
        if Path(path).stat().st_size > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT >> 20} MiB")
        return Path(path).read_text("utf-8-sig")


def read_json(what: str, path: str | Path) -> Any:
    """The value of a JSON file. UserError, with ``what`` the file is, if there is none or it is something else."""
    text = read_text(what, path)
    with reading(what, path):
        return json.loads(text)


def read_json_lines(path: str | Path, *numbers: str, put_aside: bool = False) -> list[dict[str, Any]]:
    """The objects of a file with one per line; no file is one without lines.

    A line that is damaged, as a crash can leave one, is no reason to stop: it is left out with a warning.

    Args:
        numbers: keys that every object has, with a number as value.
        put_aside: append such lines to ``NAME.damaged``; for whoever is about to write the file anew.

    Raises:
        UserError: if ``path`` is no file.
    """
    path = Path(path)
    if not path.exists():
        return []
    with reading("file of JSON lines", path):
        lines = path.read_text("utf-8", errors="surrogateescape").splitlines()
    objects, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and all(type(value.get(name)) in (int, float) for name in numbers):
            objects.append(value)
        else:
            damaged.append(line)
            logger.warning("line %d of %s is damaged and left out", number, path)
    if damaged and put_aside:
        with open(path.with_name(f"{path.name}.damaged"), "a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{line}\n" for line in damaged)
    return objects


def load_arrays(
    what: str, path: str | Path, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz`` file; its check sums are compared and no objects unpickled.

    Args:
        what: the name of such files in messages.
        optional: arrays that may be missing.

    Raises:
        UserError: if there is no such file, it is damaged or something else, or an array is missing.
    """
    arrays = {}
    with reading(what, path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for name in (*names, *optional):
            if name in members:
                with archive.open(members[name]) as file:
                    _check_claim(file, members[name].file_size)
                with archive.open(members[name]) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
            elif name in names:
                raise UserError(f"{what} {path} has no array {name!r}; it holds {', '.join(members) or 'nothing'}.")
    return arrays


def stored_array(what: str, path: str | Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Shape and type of an array of an ``.npz`` file, which may be too large to read; None if there is none."""
    with reading(what, path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename == f"{name}.npy":
                with archive.open(info) as file:
                    return _check_claim(file, info.file_size)
    return None


def map_array(
    what: str, path: str | Path, shape: tuple[int, ...] | None = None, dtype: DTypeLike | None = None
) -> NDArray[Any]:
    """An ``.npy`` file, memory-mapped; UserError unless it is one, of this shape and type where they are given."""
    with reading(what, path):
        array = np.lib.format.open_memmap(path, mode="r")
        shape, dtype = array.shape if shape is None else shape, array.dtype if dtype is None else np.dtype(dtype)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"it holds {array.dtype} {array.shape}, not {dtype} {shape}")
    return array


def _check_claim(file: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type that a stored array's header claims; ValueError if it would have more bytes than the file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    count = 1
    for side in shape:
        count *= side
    if count * dtype.itemsize > size:
        raise ValueError(f"an array of shape {shape} is claimed in {size} bytes")
    return shape, dtype
