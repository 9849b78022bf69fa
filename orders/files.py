"""Files of orders: the published JSON, and a binary form of less than half its size that loads at once.

The binary form is a safetensors file with one int16 tensor ``orders`` (num, L); its metadata says how the orders came
about, so that a file meant for another grid or schedule is recognised. A JSON file is a list of lists of raster
indices and has no room for that: it is written beside it, as ``NAME.json.settings``, and published names carry
resolution and steps (``res256_steps20_repulsion2.json``).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from orders.draw import OrderSettings
from orders.schedule import GridSize, grid_shape
from util.errors import UserError
from util.files import atomic_write, sha256, write_json

_SETTINGS = "settings"  # the metadata's key
_BLOCK_CELLS = 1 << 16  # checked at once
_PUBLISHED_NAME = re.compile(r"res(\d+)_steps(\d+)(_repulsion\d+)?\.(json|safetensors)")

# The published JSON, lexically: "[" or "," before every inner list, "]" after the last.
_ROW = re.compile(rb"\s*([\[,])\s*\[([^\[\]]*)\]")
_INTEGERS = re.compile(rb"[-\d,\s]*")
_END = re.compile(rb"\s*\]\s*\Z")
_EMPTY = re.compile(rb"\s*\[\s*\]\s*\Z")


def load_orders(path: str | Path, grid_size: GridSize, group_sizes: Sequence[int] | None = None) -> np.ndarray:
    """The orders of a ``.json`` or ``.safetensors`` file, int16 (num, L).

    Raises ``UserError``, naming the file and the row, for a file that is missing, cut short, no list of permutations of
    the grid's cells, or made for other group sizes (as far as its settings or published name tell; unchecked without
    ``group_sizes``).
    """
    path = Path(path)
    h, w = grid_shape(grid_size)
    check_suffix(path)
    if not path.is_file():
        raise UserError(f"order file {path} does not exist.")
    name = _PUBLISHED_NAME.fullmatch(path.name)
    if name and group_sizes is not None and int(name[2]) != len(group_sizes):
        raise UserError(f"order file {path} is for {name[2]} steps, but {len(group_sizes)} are asked for.")
    made_for = _recorded_settings(path)
    for setting, value in (("grid", (h, w)), ("group_sizes", group_sizes)):
        if value is not None and made_for.get(setting, list(value)) != list(value):
            raise UserError(f"order file {path} is for {setting} {made_for[setting]}, but {list(value)} are asked for.")
    orders = _read_json(path, h * w) if path.suffix == ".json" else _read_binary(path, h * w)
    _check_permutations(orders, path)
    return orders


def _read_json(path: Path, num_cells: int) -> np.ndarray:
    rows = []
    for number, text in enumerate(_json_rows(path)):
        row = np.empty(0)
        if _INTEGERS.fullmatch(text) and text.count(b",") == num_cells - 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # "1 2" is read as 1; the length gives it away
                with contextlib.suppress(ValueError):
                    row = np.fromstring(text, np.int64, sep=",")
        if len(row) != num_cells:
            raise UserError(f"order file {path}, row {number}: expected {num_cells} integers, the cells of the grid.")
        if row.min() < 0 or row.max() >= num_cells:
            raise UserError(_no_permutation(path, number, num_cells))
        rows.append(row.astype(np.int16))
    if not rows:
        raise UserError(f"order file {path} holds no orders.")
    return np.stack(rows)


def _json_rows(path: Path) -> Iterator[bytes]:
    """What is between the inner brackets, one by one: a JSON parser would need gigabytes for 60,000 × 1024 numbers."""
    number, position = 0, 0
    with open(path, "rb") as file:
        text = file.read()
    while match := _ROW.match(text, position):
        if (match[1] == b"[") != (number == 0):
            break
        yield match[2]
        number, position = number + 1, match.end()
    if not (_END if number else _EMPTY).match(text, position):
        raise UserError(f"order file {path} is cut short, or no JSON list of lists, after {number} rows.")


def _read_binary(path: Path, num_cells: int) -> np.ndarray:
    with _opened(path) as file:
        orders = file.get_tensor("orders")
    if orders.dtype != np.int16 or orders.ndim != 2 or orders.shape[1] != num_cells:
        raise UserError(f"order file {path} holds {orders.dtype} {orders.shape}, expected int16 (num, {num_cells}).")
    return orders


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"order file {path} is cut short or no file of orders ({error}).") from None


def _recorded_settings(path: Path) -> dict[str, Any]:
    """The settings that a file was drawn with, as plain data; empty if nothing says."""
    if path.suffix == ".json":
        beside = _settings_path(path)
        recorded = json.loads(beside.read_text()) if beside.is_file() else {}
        # Of an earlier file of that name, perhaps.
        return recorded["settings"] if recorded.get("sha256") == sha256(path) else {}
    with _opened(path) as file:
        return json.loads((file.metadata() or {}).get(_SETTINGS, "{}"))


def _settings_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.{_SETTINGS}")


def read_settings(path: Path) -> OrderSettings | None:
    """The settings that a file was drawn with, if it or the file beside it says."""
    values = _recorded_settings(path)
    if not values:
        return None
    values |= {name: tuple(values[name]) for name in ("grid", "group_sizes")}
    return OrderSettings(**values)


def _check_permutations(orders: np.ndarray, path: Path) -> None:
    num_cells = orders.shape[1]
    block_size = max(1, _BLOCK_CELLS // num_cells)
    row_starts = np.arange(block_size)[:, None] * num_cells
    for start in range(0, len(orders), block_size):
        block = orders[start : start + block_size]
        wrong = (block.view(np.uint16) >= num_cells).any(axis=1)  # also what is negative
        if not wrong.any():
            seen = np.zeros(block.size, bool)
            seen[(block + row_starts[: len(block)]).reshape(-1)] = True
            wrong = ~seen.reshape(block.shape).all(axis=1)
        if wrong.any():
            raise UserError(_no_permutation(path, start + int(wrong.argmax()), num_cells))


def _no_permutation(path: Path, row: int, num_cells: int) -> str:
    return f"order file {path}, row {row}: no permutation of the cells 0 … {num_cells - 1} of the grid."


def save_orders(path: str | Path, orders: np.ndarray, settings: OrderSettings | None = None) -> None:
    """Write orders (num, L) as ``.json`` or ``.safetensors``, whole or not at all.

    The ``settings`` that the orders were drawn with go into the binary form, or beside the JSON. ``UserError`` for
    another suffix.
    """
    write_orders(path, iter([np.asarray(orders)]), orders.shape, settings)


def write_orders(
    path: str | Path, chunks: Iterable[np.ndarray], shape: tuple[int, ...], settings: OrderSettings | None = None
) -> None:
    """The same for orders that come in chunks (n, L) and make up ``shape`` (num, L)."""
    path = Path(path)
    check_suffix(path)
    with atomic_write(path) as file:
        if path.suffix == ".json":
            separator = b"["
            for chunk in chunks:
                for row in chunk.tolist():
                    file.write(separator + json.dumps(row).encode())
                    separator = b", "
            file.write(b"]" if separator == b", " else b"[]")
        else:
            # The safetensors library writes whole tensors only; its format is a length, a JSON header, the numbers.
            metadata = {} if settings is None else {_SETTINGS: json.dumps(asdict(settings))}
            tensor = {"dtype": "I16", "shape": shape, "data_offsets": [0, 2 * math.prod(shape)]}
            header = json.dumps({"__metadata__": metadata, "orders": tensor}).encode()
            header += b" " * (-len(header) % 8)
            file.write(struct.pack("<Q", len(header)) + header)
            for chunk in chunks:
                file.write(chunk.astype("<i2").tobytes())
    if path.suffix == ".json" and settings is not None:
        write_json(_settings_path(path), {"settings": asdict(settings), "sha256": sha256(path)})


def check_suffix(path: Path) -> None:
    """``UserError`` unless the name ends in .json or .safetensors."""
    if path.suffix not in (".json", ".safetensors"):
        raise UserError(f"order file {path} must end in .json or .safetensors.")
