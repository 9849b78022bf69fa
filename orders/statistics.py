"""What a model sees of an order, step by step: how near the context is, and how far apart the cells of a group are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orders.schedule import GridSize, grid_shape

_PAIRS = 1 << 22  # pairs of cells measured at once


@dataclass(frozen=True)
class OrderStatistics:
    """Means over the orders for each of the n steps, float64 (n,); NaN where a step has nothing to measure."""

    near_context: np.ndarray
    """Share of the group's cells with a selected cell among their eight neighbours, before the step."""
    proximity: np.ndarray
    """Mean proximity of the group's cells: Σ 1/distance over the selected of the eight neighbours."""
    close_pairs: np.ndarray
    """Share of ordered pairs of distinct cells of the group within the repulsion threshold of each other."""
    nearest_in_group: np.ndarray
    """Mean Euclidean distance to the nearest other cell of the group."""

    def overall(self) -> dict[str, float]:
        """Each mean over the steps from the second on, a NaN left out."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no step to average over
            return {name: float(np.nanmean(values[1:])) for name, values in vars(self).items()}


def order_statistics(
    orders: np.ndarray, group_sizes: Sequence[int], grid_size: GridSize, repulsion_threshold: int
) -> OrderStatistics:
    """Measure orders (num, L), num ≥ 1, cut by group sizes that sum to L."""
    h, w = grid_shape(grid_size)
    sums = np.zeros((4, len(group_sizes)))
    block_size = max(1, _PAIRS // max(group_sizes) ** 2)
    for start in range(0, len(orders), block_size):
        block = orders[start : start + block_size].astype(np.int64)
        selected = np.zeros((len(block), h + 2, w + 2), bool)  # with a border, so that every cell has eight neighbours
        images = np.arange(len(block))[:, None]
        first = 0
        for step, size in enumerate(group_sizes):
            rows, cols = np.divmod(block[:, first : first + size], w)
            first += size
            edge, corner = np.zeros(rows.shape), np.zeros(rows.shape)
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if dy or dx:
                        (corner if dy and dx else edge)[...] += selected[images, rows + 1 + dy, cols + 1 + dx]
            selected[images, rows + 1, cols + 1] = True
            sums[:2, step] += [(edge + corner > 0).mean(1).sum(), (edge + corner / np.sqrt(2)).mean(1).sum()]
            if size == 1:
                sums[2:, step] = np.nan
                continue
            dy, dx = (np.abs(x[:, :, None] - x[:, None, :]) for x in (rows, cols))
            itself = np.eye(size, dtype=bool)
            close = (np.maximum(dy, dx) <= repulsion_threshold) & ~itself
            nearest = np.where(itself, np.inf, np.hypot(dy, dx)).min(axis=2)
            sums[2:, step] += [close.sum() / (size * (size - 1)), nearest.mean(1).sum()]
    return OrderStatistics(*(sums / len(orders)))


@dataclass(frozen=True)
class ContextStatistics:
    """Means over the orders for each of the n steps, float64 (n,); NaN where nothing is known yet."""

    known: np.ndarray
    """Share of the grid's cells that are known before the step."""
    known_neighbours: np.ndarray
    """Share of the eight neighbours (as far as the grid has them) of the group's cells that are known."""
    nearest_known: np.ndarray
    """Mean Euclidean distance of the group's cells to the nearest known cell."""
    clustering: np.ndarray
    """:func:`clustering` of the known cells: about ``known`` where they lie at random."""


def _neighbours(grid_size: GridSize) -> np.ndarray:
    """Which cells are among the eight neighbours of which: each row, of a cell, sums to 1; (L, L)."""
    h, w = grid_shape(grid_size)
    rows, cols = np.divmod(np.arange(h * w), w)
    far = np.maximum(*(np.abs(x[:, None] - x[None, :]) for x in (rows, cols)))
    return (far == 1) / np.maximum((far == 1).sum(1, keepdims=True), 1)


def clustering(known: np.ndarray, grid_size: GridSize) -> np.ndarray:
    """Mean share of the neighbours of known cells that are known: bool (N, L) to float64 (N,); NaN where none is."""
    with np.errstate(invalid="ignore"):
        return (known * (known @ _neighbours(grid_size).T)).sum(1) / known.sum(1)


def context_statistics(orders: np.ndarray, group_sizes: Sequence[int], grid_size: GridSize) -> ContextStatistics:
    """What is known when the groups of orders (num, L) are generated; num ≥ 1, the group sizes sum to L."""
    h, w = grid_shape(grid_size)
    rows, cols = np.divmod(np.arange(h * w), w)
    apart = np.hypot(rows[:, None] - rows[None, :], cols[:, None] - cols[None, :])
    share_of = _neighbours(grid_size).T
    known = np.zeros((len(orders), h * w), bool)
    nearest = np.full(known.shape, np.inf)  # distance of every cell to the nearest known one
    images, first, measured = np.arange(len(orders))[:, None], 0, []
    for size in group_sizes:
        group = orders[:, first : first + size].astype(np.int64)
        share = (known @ share_of)[images, group].mean()
        distance = nearest[images, group].mean() if first else np.nan
        measured.append((first / (h * w), share, distance, clustering(known, grid_size).mean()))
        known[images, group] = True
        first += size
        for cells in group.T:
            np.minimum(nearest, apart[cells], out=nearest)
    return ContextStatistics(*np.array(measured).T)
