"""The schedule and the orders of a run, as its flags describe them, and the orders of given images that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orders.draw import ORDER_KINDS, OrderSpec, default_repulsion, generate_orders
from orders.files import load_orders
from orders.schedule import grid_group_sizes, grid_shape, parse_group_sizes
from util.config import check, setting
from util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Group sizes and orders, whatever the grid; :meth:`for_grid` gives those of one."""

    generation_steps: int = setting(20, "decoding steps per image")
    group_sizes: str | tuple[int, ...] | None = setting(
        None, "tokens per step instead: '1,3,5', '[1]*256', a JSON list, or a file with either"
    )
    order: str = setting("lpd", "kind of the orders, drawn on the fly", choices=ORDER_KINDS)
    lpd_order_file: Path | None = setting(None, "file of orders; image i uses order i")
    proximity_threshold: float = setting(1.0, "proximity that makes a position a candidate")
    repulsion_threshold: int | None = setting(None, "distance positions of a step keep (default: grid side / 8)")

    def __post_init__(self) -> None:
        check(self, prefix="")

    def for_grid(self, grid_size: int, seed: int, num_images: int) -> Orders:
        """Schedule and orders on a square grid of this side, for images 0 … num_images − 1.

        Raises:
            UserError: for a schedule or a threshold that does not fit the grid, or a file that is missing, made for
                another schedule or grid, or too short.
        """
        grid = grid_shape(grid_size)
        if self.group_sizes is None:
            sizes = grid_group_sizes(grid, self.generation_steps)
        elif isinstance(self.group_sizes, str):
            sizes = parse_group_sizes(self.group_sizes, grid_size**2)
        else:
            sizes = self.group_sizes
        repulsion = default_repulsion(grid) if self.repulsion_threshold is None else self.repulsion_threshold
        spec = OrderSpec(self.order, grid, sizes, self.proximity_threshold, repulsion, seed)
        if self.lpd_order_file is None:
            return Orders(spec)
        rows = load_orders(self.lpd_order_file, grid_size, spec.group_sizes)
        if len(rows) < num_images:
            raise UserError(f"{self.lpd_order_file} holds {len(rows)} orders, too few for {num_images} images.")
        return Orders(spec, rows)


@dataclass(frozen=True)
class Orders:
    """The orders of images on one grid: image i has order i of the file, or of the seed.

    Args:
        rows: the orders of a file, (num, L), which then take the place of drawn ones.
    """

    spec: OrderSpec
    rows: np.ndarray | None = None

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Tokens per decoding step, summing to L."""
        return self.spec.group_sizes

    def of_images(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The orders of the images with these numbers, int16 (B, L)."""
        if self.rows is not None:
            return self.rows[np.asarray(numbers)]
        s = self.spec
        return generate_orders(
            s.kind,
            len(numbers),
            s.group_sizes,
            s.grid,
            s.proximity_threshold,
            s.repulsion_threshold,
            s.seed,
            indices=numbers,
        )
