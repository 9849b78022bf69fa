"""The cells of a comparison: orders × numbers of steps, and schedule files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.likelihood.passes import Decoding
from orders.config import OrderConfig
from orders.draw import LPD_KINDS, ORDER_KINDS, Orders
from orders.schedule import GridSize
from util.errors import UserError


@dataclass(frozen=True)
class Cell:
    """One row of the results: an order as it was asked for, cut into steps, with the class or without."""

    order: str
    decoding: Decoding

    @property
    def steps(self) -> int:
        return len(self.decoding.group_sizes)

    @property
    def name(self) -> str:
        return f"{self.order}/{self.steps}"


def parse_order(text: str) -> OrderConfig:
    """The orders that a text stands for: a kind, a locality-aware one with thresholds, or a file of orders.

    ``lpd:1.5:2`` has a proximity threshold of 1.5 and a repulsion threshold of 2; ``none`` in place of the former is
    ``lpd_far_only``. UserError for anything else.
    """
    if text.endswith((".json", ".safetensors")):
        return OrderConfig(lpd_order_file=Path(text))
    kind, *thresholds = text.split(":")
    if kind not in ORDER_KINDS:
        raise UserError(f"--orders {text!r} must be a file, or one of {', '.join(ORDER_KINDS)}.")
    if not thresholds:
        return OrderConfig(order=kind)
    try:
        tau, rho = thresholds
        repulsion = int(rho)
        if (kind, tau) == ("lpd", "none"):
            return OrderConfig(order="lpd_far_only", repulsion_threshold=repulsion)
        proximity = float(tau)
    except ValueError:
        raise UserError(f"--orders {text!r}: write thresholds as lpd:PROXIMITY:REPULSION, such as lpd:1.5:2.") from None
    if kind not in LPD_KINDS:
        raise UserError(f"--orders {text!r}: thresholds are those of locality-aware orders, such as lpd:1.5:2.")
    return OrderConfig(order=kind, proximity_threshold=proximity, repulsion_threshold=repulsion)


def make_cells(
    orders: Sequence[str],
    steps: Sequence[str],
    schedule_files: Sequence[Path],
    grid: GridSize,
    seed: int,
    conditions: Sequence[bool],
) -> list[Cell]:
    """All orders × steps, then the schedule files, each with the class, without, or both.

    Args:
        orders: as :func:`parse_order` takes them.
        steps: numbers of steps, or what ``--group_sizes`` takes.
        conditions: True for with class.

    Raises:
        UserError: for an order, a number of steps or a file that does not fit the grid; for two cells of one name.
    """
    found: list[tuple[str, Orders]] = []
    for order in orders:
        config = vars(parse_order(order))
        for text in steps:
            sizes = {"generation_steps": int(text)} if re.fullmatch(r"\d{1,9}", text) else {"group_sizes": text}
            found.append((order, OrderConfig(**config | sizes).for_grid(grid, seed)))
    found += [(file.name, OrderConfig(schedule_file=file).for_grid(grid, seed)) for file in schedule_files]
    cells = [Cell(order, Decoding(o, o.group_sizes, with_class)) for with_class in conditions for order, o in found]
    seen: set[tuple[str, bool]] = set()
    for cell in cells:
        if (which := (cell.name, cell.decoding.with_class)) in seen:
            raise UserError(f"{cell.name} is asked for twice; an order and its number of steps name a row.")
        seen.add(which)
    return cells


def baselines(cells: Sequence[Cell], asked: str | None) -> list[int | None]:
    """For each cell the number of the one it is compared with; None where there is none.

    Args:
        asked: an order, ``random``: that order at the cell's number of steps; or a cell, ``random/16``. None: the first
            order, or the first cell where all are of one order.

    Raises:
        UserError: if no cell is that.
    """
    if asked is None:
        asked = cells[0].order if len({cell.order for cell in cells}) > 1 else cells[0].name
    numbers: list[int | None] = []
    for cell in cells:
        wanted = asked if asked in {c.name for c in cells} else f"{asked}/{cell.steps}"
        same = [
            i for i, c in enumerate(cells) if c.name == wanted and c.decoding.with_class == cell.decoding.with_class
        ]
        numbers.append(same[0] if same else None)
    if set(numbers) == {None}:
        raise UserError(f"--baseline {asked!r} is none of {', '.join(dict.fromkeys(c.name for c in cells))}.")
    return numbers
