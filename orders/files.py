"""Files of schedules, and of orders: as the published JSON, or in a binary form of half its size that loads at once.

A file of one schedule with its order's kind and thresholds is JSON, as ``scripts.find_schedule`` writes it.

The binary form is a safetensors file with one int16 tensor ``orders`` (num, L); its metadata says how the orders were
drawn, so that a file for another grid or schedule is recognised. A JSON file is a list of lists of raster indices and
has no room for that: it is written beside it, as ``NAME.json.settings``, and published names carry resolution and steps
(``res256_steps20_repulsion2.json``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from orders.draw import OrderSpec
from orders.schedule import GridSize, grid_shape
from util.errors import UserError, reading
from util.files import atomic_write, sha256, write_json
from util.readers import read_json

SCHEDULE_FORMAT = "lpd-schedule"
_SPEC = "settings"  # its key in the metadata and in the file beside a JSON file
_FIRST, _NEXT = re.compile(r"\s*\[\s*(?=\[)"), re.compile(r"\s*,\s*(?=\[)")  # what stands before a list in a list
_PUBLISHED_NAME = re.compile(r"res(\d+)_steps(\d+)(?:_repulsion(\d+))?\.(json|safetensors)")


def load_orders(path: str | Path, grid_size: GridSize, group_sizes: Sequence[int] | None = None) -> np.ndarray:
    """The orders of a ``.json`` or ``.safetensors`` file, int16 (num, L).

    Raises ``UserError``, naming the file and the row, for a file that is missing, cut short, not a list of permutations
    of the grid's cells, or made for other group sizes (as far as its record or published name tells; unchecked without
    ``group_sizes``).
    """
    path = Path(path)
    h, w = grid_shape(grid_size)
    _check_suffix(path)
    name = _PUBLISHED_NAME.fullmatch(path.name)
    if name and group_sizes is not None and int(name[2]) != len(group_sizes):
        raise UserError(f"order file {path} is for {name[2]} steps, but {len(group_sizes)} are asked for.")
    recorded = _recorded(path)
    for key, value in (("grid", (h, w)), ("group_sizes", group_sizes)):
        if value is not None and recorded.get(key, list(value)) != list(value):
            raise UserError(f"order file {path} is for {key} {recorded[key]}, but {list(value)} are asked for.")
    orders = _read_json(path, h * w) if path.suffix == ".json" else _read_binary(path, h * w)
    wrong = (np.sort(orders, axis=1) != np.arange(h * w)).any(axis=1)
    if wrong.any():
        raise UserError(_not_a_permutation(path, int(wrong.argmax()), h * w))
    return orders


def _read_json(path: Path, num_cells: int) -> np.ndarray:
    orders = []
    expected = f"{num_cells} integers, the cells of the grid"
    for number, row in enumerate(_read_rows(path, "order file", expected, lambda row: len(row) == num_cells)):
        try:
            orders.append(np.array(row, np.int16))
        except OverflowError:
            raise UserError(_not_a_permutation(path, number, num_cells)) from None
    if not orders:
        raise UserError(f"order file {path} holds no orders.")
    return np.stack(orders)


def _read_binary(path: Path, num_cells: int) -> np.ndarray:
    with reading("order file", path), safe_open(path, framework="numpy") as file:
        orders = file.get_tensor("orders")
    if orders.dtype != np.int16 or orders.ndim != 2 or orders.shape[1] != num_cells:
        raise UserError(f"order file {path} holds {orders.dtype} {orders.shape}, expected int16 (num, {num_cells}).")
    return orders


def _not_a_permutation(path: Path, row: int, num_cells: int) -> str:
    return f"order file {path}, row {row}: not a permutation of the cells 0 … {num_cells - 1} of the grid."


def read_spec(path: Path) -> OrderSpec | None:
    """What the orders of a file were drawn with, if it or the file beside it says."""
    values = _recorded(path)
    return _spec(values) if values else None


def drawn_with(path: Path) -> dict[str, Any]:
    """What is known of how the orders of a file were drawn, by the names of :class:`OrderSpec`'s fields.

    All of it where it is recorded; kind and thresholds where the name is one of the published files; else nothing.
    """
    recorded, name = _recorded(path), _PUBLISHED_NAME.fullmatch(path.name)
    if recorded or name is None or name[3] is None:
        return recorded
    return {"kind": "lpd", "proximity_threshold": 1.0, "repulsion_threshold": int(name[3])}


def _recorded(path: Path) -> dict[str, Any]:
    """The same as plain data; empty if nothing says. UserError for a record that is damaged."""
    if path.suffix == ".json":
        beside = _beside(path)
        if not beside.exists():
            return {}
        with reading("record of orders", beside):
            content = read_json("record of orders", beside)
            recorded = content[_SPEC] if content["sha256"] == sha256(path) else {}  # else of an earlier file
            return _checked(recorded)
    with reading("order file", path), safe_open(path, framework="numpy") as file:
        return _checked(json.loads((file.metadata() or {}).get(_SPEC, "{}")))


def _checked(recorded: dict[str, Any]) -> dict[str, Any]:
    """A record that describes orders, or an empty one; fails in any way for another."""
    if recorded != {}:
        _spec(recorded)
    return recorded


def _spec(recorded: dict[str, Any]) -> OrderSpec:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()
    }
    return OrderSpec(**values)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings")


def save_orders(path: str | Path, orders: np.ndarray, spec: OrderSpec | None = None) -> None:
    """Write orders (num, L) as ``.json`` or ``.safetensors``: the complete file appears, or none.

    The ``spec`` that the orders were drawn with goes into the binary form, or beside the JSON. ``UserError`` for
    another suffix.
    """
    path = Path(path)
    _check_suffix(path)
    recorded = {} if spec is None else asdict(spec)
    with atomic_write(path) as file:
        if path.suffix == ".json":
            file.write(b"[" + b", ".join(json.dumps(row.tolist()).encode() for row in orders) + b"]")
        else:
            metadata = {_SPEC: json.dumps(recorded)} if recorded else None
            file.write(safetensors.numpy.save({"orders": np.ascontiguousarray(orders, np.int16)}, metadata))
    if path.suffix == ".json" and recorded:
        write_json(_beside(path), {_SPEC: recorded, "sha256": sha256(path)})


def save_schedule(path: str | Path, spec: OrderSpec, found: Mapping[str, Any]) -> None:
    """Write how orders are cut and drawn, whatever the seed, and how that was ``found``: plain data for the reader."""
    fields = {name: value for name, value in asdict(spec).items() if name != "seed"}
    write_json(path, {"format": SCHEDULE_FORMAT, **fields, "found": dict(found)})


def load_schedule(path: str | Path, grid_size: GridSize, seed: int) -> OrderSpec:
    """The orders with this seed that a file of :func:`save_schedule` describes.

    Raises ``UserError``, naming the file, for another kind of file, another grid, or values out of range.
    """
    content = read_json("schedule file", path)
    known = ("kind", "grid", "group_sizes", "proximity_threshold", "repulsion_threshold")
    if not isinstance(content, dict) or content.get("format") != SCHEDULE_FORMAT or set(known) - content.keys():
        raise UserError(f"{path} is not a schedule file of scripts.find_schedule; a list goes to --group_sizes.")
    h, w = grid_shape(grid_size)
    if content["grid"] != [h, w]:
        raise UserError(f"schedule file {path} is for grid {content['grid']}, but {[h, w]} is asked for.")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v := content[name], list) else v for name in known}
    try:
        return OrderSpec(**values, seed=seed)
    except TypeError:
        raise UserError(f"schedule file {path} holds something other than numbers in its schedule.") from None
    except UserError as error:
        raise UserError(f"schedule file {path}: {error}") from None


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".json", ".safetensors"):
        raise UserError(f"order file {path} must end in .json or .safetensors.")


def read_schedules(path: str | Path, num_tokens: int) -> list[tuple[int, ...]]:
    """The schedules of a file: a JSON list of lists of group sizes, as published for training.

    Raises ``UserError``, naming the file and the row, unless each holds positive integers that sum to ``num_tokens``.
    """

    def is_right(row: list[int]) -> bool:
        return min(row, default=0) > 0 and sum(row) == num_tokens

    rows = _read_rows(Path(path), "group-sizes file", f"positive integers that sum to {num_tokens}", is_right)
    if schedules := [tuple(row) for row in rows]:
        return schedules
    raise UserError(f"group-sizes file {path} holds no schedules.")


def _read_rows(path: Path, what: str, expected: str, is_right: Callable[[list[int]], bool]) -> Iterator[list[int]]:
    """The inner lists, one after the other: all numbers of 60,000 orders at once would take 2.5 GB.

    Args:
        what: the name of such files in messages.
        expected: what messages say that a row must be.
        is_right: whether a row of integers is that.

    Raises:
        UserError: naming the file and the row, for anything but a list of such rows.
    """
    with reading(what, path):
        text = path.read_text("utf-8", errors="replace")
    decode = json.JSONDecoder().raw_decode
    number, position = 0, 0
    between = _FIRST.match(text)
    while between:
        try:
            row, position = decode(text, between.end())
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, list) or set(map(type, row)) - {int} or not is_right(row):
            raise UserError(f"{what} {path}, row {number}: expected {expected}.")
        yield row
        number += 1
        between = _NEXT.match(text, position)
    if "".join(text[position:].split()) != ("]" if number else "[]"):
        raise UserError(f"{what} {path} is cut short, or not a JSON list of lists, after {number} rows.")
