"""The rules of locality-aware orders, one order and one cell after the other: slow, and right at a glance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable


def slow_order(
    sizes: tuple[int, ...],
    grid: tuple[int, int],
    tau: float,
    rho: int,
    first: int | list[int],
    ties: Callable[[int], list[float]],
) -> list[int]:
    """Raster indices in generation order, from the cell ``first``, or from those that are known.

    ``tau`` and ``rho`` are the proximity and the repulsion threshold; ``ties(step)`` has a random number for each cell,
    and of equals the cell with the larger one goes first.
    """
    h, w = grid
    order = [first] if isinstance(first, int) else list(first)
    selected = {divmod(cell, w) for cell in order}

    def proximity(cell: tuple[int, int]) -> float:
        others = selected & {(cell[0] + dy, cell[1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
        return round(sum(1 / math.dist(cell, other) for other in others), 9)

    for step, size in enumerate(sizes[1:], 1):
        luck = ties(step)
        left = [cell for cell in itertools.product(range(h), range(w)) if cell not in selected]
        left.sort(key=lambda cell: (-proximity(cell), -luck[cell[0] * w + cell[1]]))
        candidates = [cell for cell in left if proximity(cell) >= tau]
        others = [cell for cell in left if proximity(cell) < tau]
        group: list[tuple[int, int]] = []
        for cell in candidates:
            near = any(max(abs(cell[0] - y), abs(cell[1] - x)) <= rho for y, x in group)
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
