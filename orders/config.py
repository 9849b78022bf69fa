"""The schedule and the orders of a run, as its flags describe them; :mod:`orders.draw` has those of given images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orders.draw import ORDER_KINDS, Orders, OrderSpec, default_repulsion
from orders.files import drawn_with, load_orders, load_schedule
from orders.schedule import GridSize, grid_shape, hole_group_sizes, parse_group_sizes
from util.config import MAX_COUNT, check, setting
from util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Group sizes and orders, whatever the grid; :meth:`for_grid` gives those of one."""

    generation_steps: int = setting(20, "decoding steps per image", at_least=1, at_most=MAX_COUNT)
    group_sizes: str | tuple[int, ...] | None = setting(
        None,
        "tokens of each step instead of --generation_steps, which sum to those of an image: '1,3,5,7' for 16 tokens, "
        "'[1]*10+[2]*3', 'uniform:STEPS', a JSON list, or a file (.json, .txt) with one",
    )
    order: str = setting("lpd", "kind of the orders, drawn on the fly", choices=ORDER_KINDS)
    lpd_order_file: Path | None = setting(None, "file of orders instead of --order; image i uses order i")
    schedule_file: Path | None = setting(
        None, "file of scripts.find_schedule instead: group sizes, kind of the orders and thresholds"
    )
    proximity_threshold: float = setting(1.0, "proximity that makes a position a candidate")
    repulsion_threshold: int | None = setting(
        None, "distance positions of a step keep (default: grid side / 8)", at_least=0, at_most=MAX_COUNT
    )

    def __post_init__(self) -> None:
        check(self, prefix="")
        if self.lpd_order_file is not None and self.order != "lpd":
            raise UserError(
                f"order {self.order!r} and the order file {self.lpd_order_file} exclude each other: the file decides "
                "the orders; leave out one of them."
            )
        if self.schedule_file is not None:
            for name in ("group_sizes", "order", "lpd_order_file", "proximity_threshold", "repulsion_threshold"):
                if getattr(self, name) != getattr(OrderConfig, name):
                    raise UserError(
                        f"{name} {getattr(self, name)} and the schedule file {self.schedule_file} exclude each other: "
                        "the file decides it; leave out one of them."
                    )

    def for_grid(self, grid_size: GridSize, seed: int, num_images: int = 0, known: Sequence[int] = ()) -> Orders:
        """Schedule and orders on one grid, for images 0 … num_images − 1.

        Args:
            known: cells (raster indices) that are known beforehand. They are the first group; `group_sizes` are those
                of the others then, and `generation_steps` those of a whole picture, of which the others take a part
                (:func:`orders.schedule.hole_group_sizes`).

        Raises:
            UserError: for a schedule or a threshold that does not fit the grid, or a file that is missing, made for
                another schedule or grid, or too short.
        """
        grid = grid_shape(grid_size)
        hole = grid[0] * grid[1] - len(known)
        for file in filter(None, (self.schedule_file, self.lpd_order_file)):
            if known:
                raise UserError(f"{file} is for whole pictures; a part needs orders of its own.")
        if self.schedule_file is not None:
            return Orders(load_schedule(self.schedule_file, grid, seed))
        if self.group_sizes is None:
            sizes = hole_group_sizes(grid, self.generation_steps, hole)
        elif isinstance(self.group_sizes, str):
            sizes = parse_group_sizes(self.group_sizes, hole)
        else:
            sizes = self.group_sizes
        if known:
            sizes = (len(known), *sizes)
        repulsion = default_repulsion(grid) if self.repulsion_threshold is None else self.repulsion_threshold
        spec = OrderSpec(self.order, grid, sizes, self.proximity_threshold, repulsion, seed, tuple(known))
        rows = None if self.lpd_order_file is None else load_orders(self.lpd_order_file, grid, spec.group_sizes)
        if rows is not None and len(rows) < num_images:
            raise UserError(f"{self.lpd_order_file} holds {len(rows)} orders, too few for {num_images} images.")
        return Orders(spec, rows)

    def used(self, spec: OrderSpec) -> dict[str, Any]:
        """Kind and thresholds of the orders of :meth:`for_grid`: those of its `spec`; with a file, those that it was
        drawn with, None where neither its record nor its name says.
        """
        known = asdict(spec) if self.lpd_order_file is None else drawn_with(self.lpd_order_file)
        thresholds = ("proximity_threshold", "repulsion_threshold")
        return {"order": known.get("kind"), **{name: known.get(name) for name in thresholds}}


def parse_shares(words: Sequence[str]) -> dict[str, float]:
    """How often orders of each kind are taken, by kind: 0.5 and 0.5 for the words ``random:0.5 lpd:0.5``.

    Raises:
        UserError: unless they are different kinds with positive shares that sum to 1 (to within 1e-6).
    """
    shares: dict[str, float] = {}
    for word in words:
        kind, _, number = word.partition(":")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if kind not in ORDER_KINDS or not 0 < share <= 1:
            raise UserError(
                f"{word!r} must be a kind of order and its share above 0, such as lpd:0.5; the kinds are "
                f"{', '.join(ORDER_KINDS)}."
            )
        if kind in shares:
            raise UserError(f"the kind of order {kind!r} is given twice in {' '.join(words)!r}; give each once.")
        shares[kind] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"the shares of {' '.join(words)!r} sum to {sum(shares.values()):g}; they must sum to 1.")
    return shares
