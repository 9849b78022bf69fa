"""The schedule and the orders of a run, as its flags describe them; :mod:`orders.draw` has those of given images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orders.draw import ORDER_KINDS, Orders, OrderSpec, default_repulsion
from orders.files import drawn_with, load_orders
from orders.schedule import GridSize, grid_group_sizes, grid_shape, parse_group_sizes
from util.config import MAX_COUNT, check, setting
from util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Group sizes and orders, whatever the grid; :meth:`for_grid` gives those of one."""

    generation_steps: int = setting(20, "decoding steps per image", at_least=1, at_most=MAX_COUNT)
    group_sizes: str | tuple[int, ...] | None = setting(
        None, "tokens per step instead: '1,3,5', '[1]*256', 'uniform:STEPS', a JSON list, or a file with one"
    )
    order: str = setting("lpd", "kind of the orders, drawn on the fly", choices=ORDER_KINDS)
    lpd_order_file: Path | None = setting(None, "file of orders instead of --order; image i uses order i")
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

    def for_grid(self, grid_size: GridSize, seed: int, num_images: int = 0) -> Orders:
        """Schedule and orders on one grid, for images 0 … num_images − 1.

        Raises:
            UserError: for a schedule or a threshold that does not fit the grid, or a file that is missing, made for
                another schedule or grid, or too short.
        """
        grid = grid_shape(grid_size)
        if self.group_sizes is None:
            sizes = grid_group_sizes(grid, self.generation_steps)
        elif isinstance(self.group_sizes, str):
            sizes = parse_group_sizes(self.group_sizes, grid[0] * grid[1])
        else:
            sizes = self.group_sizes
        repulsion = default_repulsion(grid) if self.repulsion_threshold is None else self.repulsion_threshold
        spec = OrderSpec(self.order, grid, sizes, self.proximity_threshold, repulsion, seed)
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
