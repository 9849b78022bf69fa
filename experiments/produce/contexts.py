"""Does a model decode from contexts that it was trained on? What is known around a token, in training and in decoding.

Needs no model. In uniformly random training orders the known tokens lie anywhere; locality-aware decoding makes them
cluster. How unusual such a context is for a model trained on random orders is the share of random contexts of the same
size that are clustered more, equals counted half: 0.5 is usual, 0 is never seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import NAMES
from orders import generate_orders, published_group_sizes
from orders.schedule import grid_group_sizes
from orders.statistics import clustering, context_statistics
from util.plots import plot_curves

NUM_ORDERS, NUM_RANDOM, BINS = 200, 2000, 8
FIGURES = ("known_neighbours", "nearest_known", "clustering")


def measure_contexts(
    img_size: int,
    stride: int,
    orders: Sequence[str],
    steps: Sequence[int],
    trainings: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Contexts of decoding and of training.

    Args:
        trainings: shares of the kinds of training orders (:func:`orders.config.parse_shares`), by name of the training.

    Returns:
        Plain data. ``decoding``: by order and number of steps, lists over the steps from the second on; ``training``:
        by name, lists over bins of the share of tokens known, means over the tokens asked for. The lists are ``known``
        (share of all tokens), ``known_neighbours``, ``nearest_known`` and ``clustering`` (see
        :class:`orders.statistics.ContextStatistics`); of decoding also ``at_random``, the share of random contexts that
        are clustered more.
    """
    grid = img_size // stride
    random = _RandomContexts(grid)
    decoding = {
        order: {str(number): _decoding(order, grid_group_sizes(grid, number), grid, random) for number in steps}
        for order in orders
    }
    schedules = published_group_sizes(img_size, stride)
    training = {name: _training(shares, schedules, grid) for name, shares in trainings.items()}
    return {"orders_per_mean": NUM_ORDERS, "decoding": decoding, "training": training}


class _RandomContexts:
    """Clustering of tokens that lie at random, by how many they are."""

    def __init__(self, grid: int) -> None:
        self.grid = grid
        self.found: dict[int, np.ndarray] = {}
        self.orders = generate_orders("random", NUM_RANDOM, (1,) * grid**2, grid, seed=1)

    def share(self, values: np.ndarray, count: int) -> float:
        """Mean share of random contexts of ``count`` tokens clustered more than the values; equals count half."""
        if count not in self.found:
            known = np.zeros(self.orders.shape, bool)
            np.put_along_axis(known, self.orders[:, :count].astype(np.int64), True, axis=1)
            self.found[count] = np.sort(clustering(known, self.grid))
        below, not_above = (np.searchsorted(self.found[count], values + shift).mean() for shift in (-1e-9, 1e-9))
        return float(1 - (below + not_above) / 2 / NUM_RANDOM)


def _decoding(order: str, sizes: Sequence[int], grid: int, random: _RandomContexts) -> dict[str, list[float]]:
    drawn = generate_orders(order, NUM_ORDERS, sizes, grid)
    measured = {name: values[1:].tolist() for name, values in vars(context_statistics(drawn, sizes, grid)).items()}
    at_random, known = [], np.zeros(drawn.shape, bool)
    for count in np.cumsum(sizes)[:-1].tolist():
        np.put_along_axis(known, drawn[:, :count].astype(np.int64), True, axis=1)
        at_random.append(random.share(clustering(known, grid), count))
    return measured | {"at_random": at_random}


def _training(shares: Mapping[str, float], schedules: Sequence[tuple[int, ...]], grid: int) -> dict[str, list[float]]:
    """Means over the tokens that a training asks for, in bins of the share of tokens that are known."""
    names = ("known", *FIGURES)
    sums, weights = np.zeros((len(names), BINS)), np.zeros(BINS)
    for sizes in schedules:
        for kind, share in shares.items():
            measured = context_statistics(generate_orders(kind, NUM_ORDERS, sizes, grid), sizes, grid)
            bins, weight = (measured.known[1:] * BINS).astype(int), share * np.array(sizes[1:])
            np.add.at(weights, bins, weight)
            for row, name in zip(sums, names, strict=True):
                np.add.at(row, bins, weight * getattr(measured, name)[1:])
    return {name: (row[weights > 0] / weights[weights > 0]).tolist() for name, row in zip(names, sums, strict=True)}


def plot_contexts(
    path: Path, contexts: dict[str, Any], figure: str, ylabel: str, orders: Sequence[str], steps: int
) -> None:
    """A figure against the share of tokens known: a line per training, and per order in that many decoding steps."""
    decoding = contexts["decoding"]
    found = {f"trained: {name}": lines for name, lines in contexts["training"].items()}
    found |= {f"decoded: {NAMES[order]}": decoding[order][str(steps)] for order in orders if order in decoding}
    curves = {label: (lines["known"], lines[figure]) for label, lines in found.items()}
    plot_curves(path, curves, f"share of tokens known ({steps} decoding steps)", ylabel)


def context_rows(contexts: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(order, steps, known neighbours, distance to the nearest known, clustering, at random): means over the steps."""
    names = (*FIGURES, "at_random")
    return [
        (order, int(number), *(float(np.mean(lines[name])) for name in names))
        for order, by_steps in contexts["decoding"].items()
        for number, lines in by_steps.items()
    ]
