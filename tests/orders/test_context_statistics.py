"""What is known when a group is generated, against counting cell by cell."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orders import generate_orders
from orders.schedule import cosine_group_sizes
from orders.statistics import context_statistics


def counted(order: list[int], sizes: tuple[int, ...], h: int, w: int) -> list[tuple[float, list[float], list[float]]]:
    """(share known, known shares of neighbours, nearest distances) of every step of one order, and nothing clever."""

    def share(cell: int, known: set[int]) -> float:
        y, x = divmod(cell, w)
        around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        inside = [a * w + b for a, b in around if 0 <= a < h and 0 <= b < w]
        return sum(cell in known for cell in inside) / len(inside)

    steps, first = [], 0
    for size in sizes:
        known, group = set(order[:first]), order[first : first + size]
        nearest = [min((math.dist(divmod(c, w), divmod(k, w)) for k in known), default=math.nan) for c in group]
        steps.append((first / (h * w), [share(c, known) for c in group], nearest))
        first += size
    return steps


@pytest.mark.parametrize("kind", ["lpd", "random", "raster"])
@pytest.mark.parametrize(("grid", "steps"), [((4, 4), 16), ((5, 3), 4)])
def test_against_counting(kind: str, grid: tuple[int, int], steps: int) -> None:
    sizes = cosine_group_sizes(grid[0] * grid[1], steps)
    orders = generate_orders(kind, 7, sizes, grid, seed=1)
    found = context_statistics(orders, sizes, grid)
    slow = [counted(order, sizes, *grid) for order in orders.tolist()]
    for step in range(len(sizes)):
        known = slow[0][step][0]
        shares, nearest = (np.array([one[step][part] for one in slow]) for part in (1, 2))
        assert found.known[step] == pytest.approx(known)
        assert found.known_neighbours[step] == pytest.approx(shares.mean())
        assert found.nearest_known[step] == pytest.approx(nearest.mean(), nan_ok=True)
    assert np.isnan(found.nearest_known[0])


def test_known_cells_at_random_are_as_clustered_as_the_share_of_all_says() -> None:
    sizes = (1,) * 64
    found = context_statistics(generate_orders("random", 3000, sizes, 8), sizes, 8)
    expected = (np.arange(64) - 1) / 63  # a known cell has the others of its context around it by chance
    assert np.abs(found.clustering[4:] - expected[4:]).max() < 0.02
    assert np.abs(found.known_neighbours - np.arange(64) / 63).max() < 0.02
    clustered = context_statistics(generate_orders("raster", 1, sizes, 8), sizes, 8)
    assert clustered.clustering[32] == pytest.approx((24 * 1 + 2 * 3 / 5 + 6 * 5 / 8) / 32)
