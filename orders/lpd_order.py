"""Locality-aware orders ("Locality-aware Parallel Decoding", arXiv:2507.01957, section 3), thousands at a time.

Every step picks a group of cells that lie close to what is known (proximity) and far from each other (repulsion). All
orders of a batch advance together: a pick is a handful of array operations on arrays with one number per cell and
order. The same code runs on NumPy and on torch and gives the same orders.

Legend: ``N`` orders, the last and fastest axis of the arrays; ``h, w`` grid; ``L`` = h·w cells; ``xp`` array module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orders.counter_rng import TieKeys, order_states, sub_states, uniform_cells

MAX_SIDE = 128  # squared distances are held in 16 bits

# The proximity e + c/√2 of a cell with e edge and c corner neighbours, as the integer 7e + 5c ("closeness"): for
# e, c ≤ 4 it sorts in the same order and without ties, as no fraction of numbers up to 4 lies between 1/√2 and 5/7.
_EDGE, _CORNER = 7, 5
_LEVELS = 4 * (_EDGE + _CORNER) + 1

_TIE_BITS = 25  # of a tie key; the closeness goes above it
_FAR = 32767  # more than any squared distance


def closeness(proximity: float) -> int:
    """The least ``7e + 5c`` whose proximity ``e + c/√2`` reaches this one; 49 if none does."""
    counts = [(e, c) for e in range(5) for c in range(5) if e + c / math.sqrt(2) >= proximity - 1e-9]
    return min((_EDGE * e + _CORNER * c for e, c in counts), default=_LEVELS)


def lpd_orders(
    xp: Any,
    indices: Any,
    group_sizes: Sequence[int],
    grid: tuple[int, int],
    proximity_threshold: float,
    repulsion_threshold: int,
    seed: int,
    *,
    use_proximity: bool = True,
    device: Any = "cpu",
) -> Any:
    """The orders of these numbers, int16 (N, L), on the device of ``indices`` (N,), int64.

    ``group_sizes`` starts with 1 and sums to L. Without ``use_proximity`` all cells count as equally close. The
    arguments are taken as valid; :func:`orders.generate_orders` is the checked way in.
    """
    batch = _Batch(xp, len(indices), grid, repulsion_threshold, device)
    threshold = closeness(proximity_threshold) if use_proximity else 0
    states = order_states(indices, seed)
    batch.orders[0] = uniform_cells(sub_states(states, 0), grid[0] * grid[1])
    batch.select(0, 1)
    first = 1
    for step, size in enumerate(group_sizes[1:], 1):
        levels = batch.closeness() if use_proximity else xp.zeros_like(batch.selected)
        batch.rank(levels, threshold, sub_states(states, step))
        batch.fill(first, size, batch.walk(first, size))
        batch.select(first, size)
        first += size
    return batch.orders[:-1].T


class _Batch:
    """N orders that grow together, and the memory that every step uses again."""

    def __init__(self, xp: Any, num: int, grid: tuple[int, int], radius: int, device: Any) -> None:
        self.xp, self.num, (self.h, self.w) = xp, num, grid
        h, w, cells = self.h, self.w, self.h * self.w
        self.radius = radius = min(radius, max(h, w) - 1)
        self.ties = TieKeys(xp, cells, _TIE_BITS, device)

        def zeros(*shape: int, dtype: Any) -> Any:
            return xp.zeros(shape, dtype=dtype, device=device)

        # Row p holds the cells at position p; the row after the last takes what is to be dropped.
        self.orders = zeros(cells + 1, num, dtype=xp.int16)
        # 1 for selected cells, with a border of zeros so that every cell has eight neighbours.
        self.padded = zeros(h + 2, w + 2, num, dtype=xp.uint8)
        self.selected = self.padded[1:-1, 1:-1]
        # What the walk may still take (0: nothing), with a border as wide as the repulsion reaches.
        self.padded_keys = zeros(h + 2 * radius, w + 2 * radius, num, dtype=xp.int32)
        self.keys = self.padded_keys[radius : radius + h, radius : radius + w]
        self.ranks = zeros(h, w, num, dtype=xp.int32)
        self.numbers = xp.arange(num, dtype=xp.int64, device=device)
        self.rows = xp.arange(h, dtype=xp.int16, device=device)[:, None]
        self.cols = xp.arange(w, dtype=xp.int16, device=device)[:, None]
        side = xp.arange(2 * radius + 1, dtype=xp.int64, device=device)
        self.window = (side[:, None] * (w + 2 * radius) + side).reshape(-1, 1) * num + self.numbers
        self._memory = {
            "keys": zeros(cells * num, dtype=xp.int32),
            "ranks": zeros(cells * num, dtype=xp.int32),
            "squares": zeros(cells * num, dtype=xp.int16),
            "distances": zeros(cells * num, dtype=xp.int16),
        }

    def scratch(self, name: str, num: int) -> Any:
        """An array (h, w, num) of undefined content, in the memory of this name."""
        return self._memory[name][: self.h * self.w * num].reshape(self.h, self.w, num)

    def pick(self, name: str, array: Any, numbers: Any) -> Any:
        """These orders out of an array (h, w, n), in the memory of this name."""
        result = self.scratch(name, len(numbers))
        result[...] = array[:, :, numbers]
        return result

    def select(self, first: int, size: int) -> None:
        """Mark the cells at these positions of the orders as selected."""
        cells = self.xp.asarray(self.orders[first : first + size], dtype=self.xp.int64)
        padded = (cells // self.w + 1) * (self.w + 2) + cells % self.w + 1
        self.padded.reshape(-1)[padded * self.num + self.numbers] = 1

    def closeness(self) -> Any:
        """``7e + 5c`` of every cell, uint8 (h, w, N)."""
        s = self.padded
        above_below = s[:-2] + s[2:]
        result = above_below[:, 1:-1] + s[1:-1, :-2]
        result += s[1:-1, 2:]
        result *= _EDGE
        corners = above_below[:, :-2] + above_below[:, 2:]
        corners *= _CORNER
        result += corners
        return result

    def rank(self, levels: Any, threshold: int, states: Any) -> None:
        """Set the order in which a step looks at the cells: the candidates' for the walk, everybody's for the fill.

        The fill goes through those that are no candidates first and then through the candidates, the closest first in
        both, which is the order of the levels rotated; the candidates alone are sorted by it as they should be.
        """
        xp = self.xp
        keys = self.scratch("keys", self.num)
        self.ties.draw(states, self.ranks.reshape(-1, self.num), keys.reshape(-1, self.num))
        candidates = xp.zeros_like(levels)
        candidates[...] = levels >= threshold
        rotated = levels + (1 + _LEVELS - threshold)
        rotated -= candidates * _LEVELS
        keys[...] = rotated
        keys <<= _TIE_BITS
        self.ranks |= keys
        candidates *= 1 - self.selected
        self.keys[...] = candidates
        self.keys *= self.ranks

    def walk(self, first: int, size: int) -> Any:
        """Take candidates, the closest first, that repel none taken before; returns how many were taken, (N,)."""
        xp = self.xp
        keys = self.padded_keys.reshape(-1)
        counts = xp.zeros_like(self.numbers)
        for position in range(first, first + size):
            best = xp.amax(self.keys, axis=(0, 1))
            found = best > 0
            if not bool(found.any()):
                break
            cell = best & self.ties.index_mask
            cell *= found  # an order without candidates clears its first window, to no effect
            self.orders[position] = cell
            counts += found
            keys[self.window + (cell + cell // self.w * (2 * self.radius)) * self.num] = 0
        return counts

    def fill(self, first: int, size: int, counts: Any) -> None:
        """Complete the groups that the walk left short, by farthest-point sampling from the cells that are left."""
        xp = self.xp
        numbers = xp.argwhere(counts < size)[:, 0]
        if len(numbers) == 0:
            return
        if len(numbers) < 0.6 * self.num:  # above that it is dearer to pick them out than to carry the others along
            counts = counts[numbers]
            selected, ranks = self.selected[:, :, numbers], self.pick("ranks", self.ranks, numbers)
        else:
            numbers, selected, ranks = self.numbers, self.selected, self.ranks
        # Squared distances to the nearest cell of the group; −1 for cells selected before.
        distances = self.scratch("distances", len(numbers))
        distances[...] = selected
        distances *= -_FAR - 1
        distances += _FAR
        for i in range(int(counts.max())):
            self.approach(distances, self.orders[first + i, numbers], i < counts)

        def take(cells: Any, which: Any) -> None:
            self.orders[xp.where(which, first + counts, len(self.orders) - 1), numbers] = cells
            self.approach(distances, cells, which)

        empty = counts == 0
        if bool(empty.any()):  # such a group starts anywhere
            take(self.farthest(distances, ranks & ((1 << _TIE_BITS) - 1)), empty)
            counts = counts + empty
        while True:
            short = counts < size
            left = int(short.sum())
            if not left:
                return
            if left < 0.7 * len(numbers):
                kept = xp.argwhere(short)[:, 0]
                numbers, counts, short = numbers[kept], counts[kept], short[kept]
                ranks, distances = self.pick("ranks", ranks, kept), self.pick("distances", distances, kept)
            take(self.farthest(distances, ranks), short)
            counts = counts + short

    def farthest(self, distances: Any, ranks: Any) -> Any:
        """Per order the cell of the largest distance, the highest rank among equals: int16 (n,)."""
        xp = self.xp
        behind = self.scratch("squares", distances.shape[2])
        xp.subtract(distances, xp.amax(distances, axis=(0, 1)), out=behind)
        behind >>= 15  # 0 for the farthest, −1 for the others
        keys = self.scratch("keys", distances.shape[2])
        keys[...] = behind
        keys |= ranks
        return xp.asarray(xp.amax(keys, axis=(0, 1)) & self.ties.index_mask, dtype=xp.int16)

    def approach(self, distances: Any, cells: Any, which: Any) -> None:
        """Lower the squared distances to those from ``cells`` (n,), int16, where ``which`` (n,)."""
        xp = self.xp
        rows = cells // self.w
        dy, dx = self.rows - rows, self.cols - (cells - rows * self.w)
        dy, dx = xp.where(which, dy * dy, _FAR), xp.where(which, dx * dx, 0)
        squares = self.scratch("squares", distances.shape[2])
        xp.add(dy[:, None], dx[None], out=squares)
        xp.minimum(distances, squares, out=distances)
