"""The rules of locality-aware orders, one order and one cell after the other: slow, and right at a glance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from orders.order_states import TieKeys, order_states, sub_states, uniform_cells


def slow_order(
    sizes: tuple[int, ...],
    grid: tuple[int, int],
    tau: float | tuple[float | None, ...] | None,
    rho: int | tuple[int, ...],
    first: int | list[int],
    ties: Callable[[int], list[float]],
) -> list[int]:
    """Raster indices in generation order, from the cell ``first``, or from those that are known.

    ``tau`` and ``rho`` are the proximity and the repulsion threshold, of all steps or of each; where ``tau`` is None,
    proximity plays no part. ``ties(step)`` has a random number for each cell, and of equals the cell with the larger
    one goes first.
    """
    h, w = grid
    order = [first] if isinstance(first, int) else list(first)
    selected = {divmod(cell, w) for cell in order}
    taus = tau if isinstance(tau, tuple) else (tau,) * len(sizes)
    rhos = rho if isinstance(rho, tuple) else (rho,) * len(sizes)

    def proximity(cell: tuple[int, int]) -> float:
        if taus[step] is None:
            return 0.0
        others = selected & {(cell[0] + dy, cell[1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
        return round(sum(1 / math.dist(cell, other) for other in others), 9)

    for step, size in enumerate(sizes[1:], 1):
        luck = ties(step)
        left = [cell for cell in itertools.product(range(h), range(w)) if cell not in selected]
        left.sort(key=lambda cell: (-proximity(cell), -luck[cell[0] * w + cell[1]]))
        least = taus[step] or 0.0
        candidates = [cell for cell in left if proximity(cell) >= least]
        others = [cell for cell in left if proximity(cell) < least]
        group: list[tuple[int, int]] = []
        for cell in candidates:
            near = any(max(abs(cell[0] - y), abs(cell[1] - x)) <= rhos[step] for y, x in group)
            if len(group) < size and not near:
                group.append(cell)
            else:
                others.append(cell)
        while len(group) < size:
            if group:
                far = [min((cell[0] - y) ** 2 + (cell[1] - x) ** 2 for y, x in group) for cell in others]
                group.append(others.pop(far.index(max(far))))
            else:
                group.append(others.pop(max(range(len(others)), key=lambda i: luck[others[i][0] * w + others[i][1]])))
        order += [y * w + x for y, x in group]
        selected |= set(group)
    return order


def our_luck(grid: tuple[int, int], seed: int, index: int) -> tuple[int, Callable[[int], list[float]]]:
    """The first cell and the tie keys that the fast version draws for an order."""
    cells = grid[0] * grid[1]
    states, keys = order_states(np.array([index]), seed), TieKeys(np, cells, 25)

    def ties(step: int) -> list[float]:
        out = np.empty((cells, 1), np.int32)
        return keys.draw(sub_states(states, step), out, np.empty_like(out))[:, 0].tolist()

    return int(uniform_cells(sub_states(states, 0), cells)[0]), ties
