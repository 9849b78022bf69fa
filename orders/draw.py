"""How orders are drawn: arguments checked, the work cut into chunks, the chunks spread over threads."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from orders.baselines import FIXED_KINDS, fixed_order, random_orders
from orders.lpd_order import MAX_SIDE, lpd_orders
from orders.schedule import GridSize, check_group_sizes, grid_shape
from util.errors import UserError

LPD_KINDS = ("lpd", "lpd_near_only", "lpd_far_only")

#: Names of all orders, as the command lines' ``--order`` takes them.
ORDER_KINDS: tuple[str, ...] = ("lpd", "raster", "random", "halton", "par", "zipar", "nar", *LPD_KINDS[1:])

# Cells × orders of a chunk: its arrays fit a CPU's cache, or occupy a GPU.
_CHUNK_CELLS = {"cpu": 1 << 19, "cuda": 1 << 24}


def default_repulsion(grid_size: GridSize) -> int:
    """Repulsion threshold where none is given: an eighth of the grid's shorter side, rounded down, at least 1.

    That is the published 2 at 256 px and 4 at 512 px. (LPD-XXL was evaluated with 3.)
    """
    return max(1, min(grid_shape(grid_size)) // 8)


@dataclass(frozen=True)
class OrderSpec:
    """All that decides what order ``i`` is; checked on construction (``UserError``). See :func:`generate_orders`."""

    kind: str
    grid: tuple[int, int]
    group_sizes: tuple[int, ...]
    proximity_threshold: float
    repulsion_threshold: int
    seed: int
    known: tuple[int, ...] = ()
    """Cells known beforehand: the first group of every order. The others are ordered as if these had just come."""

    def __post_init__(self) -> None:
        h, w = self.grid
        if self.kind not in ORDER_KINDS:
            raise UserError(f"order {self.kind!r} must be one of {', '.join(ORDER_KINDS)}.")
        if max(h, w) > MAX_SIDE:
            raise UserError(f"grid {h}×{w} is larger than {MAX_SIDE}×{MAX_SIDE}.")
        object.__setattr__(self, "group_sizes", check_group_sizes(self.group_sizes, h * w))
        object.__setattr__(self, "known", tuple(sorted(map(int, self.known))))
        if self.known:
            self._check_known()
        elif self.kind in LPD_KINDS and self.group_sizes[0] != 1:
            raise UserError(f"order {self.kind!r} needs 1 as the first group size, got {self.group_sizes[0]}.")
        if not math.isfinite(self.proximity_threshold):
            raise UserError(f"proximity threshold {self.proximity_threshold} must be a finite number.")
        if self.repulsion_threshold < 0 or self.repulsion_threshold != int(self.repulsion_threshold):
            raise UserError(f"repulsion threshold {self.repulsion_threshold} must be a whole number, 0 or more.")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed {self.seed} must lie between 0 and 2^63 − 1.")

    def _check_known(self) -> None:
        h, w = self.grid
        if len(set(self.known)) < len(self.known) or self.known[0] < 0 or self.known[-1] >= h * w:
            raise UserError(f"known cells must be different cells of the grid, 0 to {h * w - 1}, got {self.known}.")
        if self.group_sizes[0] != len(self.known):
            raise UserError(f"{len(self.known)} cells are known, but the first group has {self.group_sizes[0]}.")

    def draw(
        self, indices: np.ndarray, *, device: str = "cpu", workers: int | None = None, progress: bool = False
    ) -> np.ndarray:
        """The orders of these numbers (N,), int64: int16 (N, L), in chunks that the device's memory holds.

        ``device`` and ``workers`` are those of :func:`generate_orders`; ``progress`` shows a progress bar.
        """
        if workers is None:
            workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if workers < 1:
            raise UserError(f"number of workers {workers} must be at least 1.")
        if (indices < 0).any():
            raise UserError(f"order numbers start at 0, got {indices.min()}.")
        gpu = None
        if device != "cpu":
            from util.dist import resolve_device  # needs torch

            gpu = resolve_device(device)
        orders = np.empty((len(indices), self.grid[0] * self.grid[1]), np.int16)
        size = max(1, _CHUNK_CELLS["cpu" if gpu is None else "cuda"] // orders.shape[1])

        def draw(start: int) -> int:
            chunk = slice(start, start + size)
            orders[chunk] = self._draw_chunk(indices[chunk], gpu)
            return len(indices[chunk])

        # Threads serve, as NumPy's array operations release the interpreter lock.
        with ThreadPoolExecutor(workers) as pool, tqdm(total=len(indices), unit=" orders", disable=not progress) as bar:
            for num in (pool.map if gpu is None else map)(draw, range(0, len(indices), size)):
                bar.update(num)
        return orders

    def _draw_chunk(self, indices: np.ndarray, gpu: Any) -> np.ndarray:
        """The same at once, with NumPy or on a torch device."""
        if self.kind in FIXED_KINDS:
            return self._known_first(fixed_order(self.kind, self.grid)[None])
        if self.kind == "random":
            return self._known_first(random_orders(indices, self.grid[0] * self.grid[1], self.seed))
        tau, rho = (0.0, 0) if self.kind == "lpd_near_only" else (self.proximity_threshold, self.repulsion_threshold)
        rest = self.group_sizes, self.grid, tau, int(rho), self.seed, self.kind != "lpd_far_only", self.known
        if gpu is None:
            return lpd_orders(np, indices, *rest)
        import torch

        return lpd_orders(torch, torch.from_numpy(indices).to(gpu), *rest).cpu().numpy()

    def _known_first(self, orders: np.ndarray) -> np.ndarray:
        """Orders (N, L) with the known cells moved to the front."""
        if not self.known:
            return orders
        unknown = orders[~np.isin(orders, self.known)].reshape(len(orders), -1)
        return np.concatenate([np.broadcast_to(self.known, (len(orders), len(self.known))), unknown], axis=1)


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
        numbers = np.asarray(numbers, np.int64)
        return self.spec.draw(numbers) if self.rows is None else self.rows[numbers]


def generate_orders(
    kind: str,
    num: int,
    group_sizes: Sequence[int],
    grid_size: GridSize,
    proximity_threshold: float = 1.0,
    repulsion_threshold: int | None = None,
    seed: int = 0,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    device: str = "cpu",
    workers: int | None = None,
) -> np.ndarray:
    """Generation orders: int16 (num, L), each row a permutation of the raster indices of the grid.

    Order ``i`` follows from (seed, i) and the arguments before ``seed``: not from the device, the chunks, the workers
    or the orders drawn beside it.

    Args:
        kind: one of ``ORDER_KINDS``. ``lpd`` is locality-aware (arXiv:2507.01957). ``lpd_near_only`` is the same
            without repulsion: the cells closest to what is known, however close to each other. ``lpd_far_only`` is
            the same without proximity: cells far from each other, wherever they are. :mod:`orders.baselines` has the
            rest, of which only ``random`` varies from order to order.
        num: number of orders.
        group_sizes: sizes that sum to L. The ``lpd`` kinds follow them and need 1 as the first.
        grid_size: side of a square grid, or (rows, columns); at most 128 per side.
        proximity_threshold: τ of ``lpd``: the proximity (Σ 1/distance over the selected of the eight neighbours) from
            which a cell is a candidate.
        repulsion_threshold: ρ of ``lpd`` and ``lpd_far_only``: the Chebyshev distance within which the candidates of a
            group exclude each other; :func:`default_repulsion` where it is None.
        seed: 0 … 2^63 − 1.
        indices: the ``num`` order numbers to draw, instead of 0 … num − 1: an evaluation process asks for its own.
        device: where the ``lpd`` kinds are computed: ``cpu`` (NumPy) or ``cuda[:k]`` (torch), with the same result,
            which is a NumPy array in either case.
        workers: threads on a CPU; all available cores where it is None.

    Raises:
        UserError: an argument out of range, named.
    """
    grid = grid_shape(grid_size)
    repulsion = default_repulsion(grid) if repulsion_threshold is None else repulsion_threshold
    spec = OrderSpec(kind, grid, tuple(group_sizes), proximity_threshold, repulsion, seed)
    numbers = np.arange(num) if indices is None else np.asarray(indices, np.int64)
    if numbers.shape != (num,):
        raise UserError(f"num must be 0 or more and the number of indices, got {num} and shape {numbers.shape}.")
    return spec.draw(numbers, device=device, workers=workers)
