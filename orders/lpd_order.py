"""Locality-aware orders ("Locality-aware Parallel Decoding", arXiv:2507.01957), thousands at a time.

Every step picks a group of cells that lie close to what is known (proximity) and far from each other (repulsion). All
orders of a batch advance together: a pick is a handful of array operations on arrays with one number per cell and
order. The same code runs on NumPy and on torch and gives the same orders.

Legend: ``N`` orders, the last and fastest axis of the arrays; ``h, w`` grid; ``L`` = h·w cells; ``xp`` array module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from orders.order_states import TieKeys, order_states, sub_states, uniform_cells

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
    use_proximity: bool = True,
    known: Sequence[int] = (),
) -> Any:
    """The orders of these numbers, int16 (N, L), on the device of ``indices`` (N,), int64.

    ``group_sizes`` starts with 1 and sums to L. Without ``use_proximity`` all cells count as equally close. Where cells
    are ``known`` beforehand, they are the first group, whatever their number, and the first step after them already
    counts the proximity to them. The arguments are taken as valid; :func:`orders.generate_orders` and
    :class:`orders.draw.OrderSpec` are the checked ways in.
    """
    batch = _Batch(xp, len(indices), grid, repulsion_threshold, indices.device)
    threshold = closeness(proximity_threshold) if use_proximity else 0
    states = order_states(indices, seed)
    first = group_sizes[0]
    if known:
        batch.orders[:first] = xp.asarray(known, dtype=xp.int16, device=indices.device)[:, None]
    else:
        batch.orders[0] = uniform_cells(sub_states(states, 0), grid[0] * grid[1])
    batch.select(0, first)
    for step, size in enumerate(group_sizes[1:], 1):
        levels = batch.closeness() if use_proximity else xp.zeros_like(batch.selected)
        batch.rank(levels, threshold, sub_states(states, step))
        batch.fill(first, size, batch.walk(first, size))
        batch.select(first, size)
        first += size
    return batch.orders.T


class _Batch:
    """N orders that grow together, and the memory that every step uses again."""

    def __init__(self, xp: Any, num: int, grid: tuple[int, int], radius: int, device: Any) -> None:
        self.xp, self.num, (self.h, self.w) = xp, num, grid
        h, w, cells = self.h, self.w, self.h * self.w
        self.radius = radius = min(radius, max(h, w) - 1)
        self.ties = TieKeys(xp, cells, _TIE_BITS, device)

        def zeros(*shape: int, dtype: Any) -> Any:
            return xp.zeros(shape, dtype=dtype, device=device)

        self.orders = zeros(cells, num, dtype=xp.int16)  # row p: the cells at position p
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
            "squares": zeros(cells * num, dtype=xp.int16),
            "distances": zeros(cells * num, dtype=xp.int16),
        }

    def scratch(self, name: str, num: int) -> Any:
        """An array (h, w, num) of undefined content, in the memory of this name."""
        return self._memory[name][: self.h * self.w * num].reshape(self.h, self.w, num)

    def pick(self, array: Any, numbers: Any) -> Any:
        """``array[:, :, numbers]``, many times faster."""
        if hasattr(self.xp, "index_select"):
            return self.xp.index_select(array, 2, numbers)
        return np.take(array, numbers, axis=2, mode="clip")

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
        """Rank the cells for a step, its candidates for the walk and all of them for the fill.

        Among equally far cells the fill prefers those that are no candidates, and in either class the closest: that is
        the order of the levels, rotated, and candidates among themselves are in the order that the walk needs.
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
            cell = best & self.ties.index_mask  # 0 without candidates: clears that window, to no effect
            self.orders[position] = cell
            counts += found
            keys[self.window + (cell + cell // self.w * (2 * self.radius)) * self.num] = 0
        return counts

    def fill(self, first: int, size: int, counts: Any) -> None:
        """Complete the groups that the walk left short, by farthest-point sampling from the cells that are left."""
        xp = self.xp
        short = int((counts < size).sum())
        if not short:
            return
        # The shortest groups first: those that lack a cell at some position are then the first few of the arrays.
        numbers = xp.argsort(counts)[:short]
        counts = counts[numbers]
        ranks = self.pick(self.ranks, numbers)
        # Squared distances to the nearest cell of the group; −1 for cells selected before.
        distances = self.scratch("distances", short)
        distances[...] = self.pick(self.selected, numbers)
        distances *= -_FAR - 1
        distances += _FAR
        for i in range(size):
            lacking = int((counts <= i).sum())
            if lacking:
                among = ranks[:, :, :lacking]
                if i == 0:  # an empty group starts anywhere
                    among = among & ((1 << _TIE_BITS) - 1)
                self.orders[first + i, numbers[:lacking]] = self.farthest(distances[:, :, :lacking], among)
            self.approach(distances, self.orders[first + i, numbers])

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

    def approach(self, distances: Any, cells: Any) -> None:
        """Lower the squared distances to those from ``cells`` (n,), int16."""
        rows = cells // self.w
        dy, dx = self.rows - rows, self.cols - (cells - rows * self.w)
        dy *= dy
        dx *= dx
        squares = self.scratch("squares", distances.shape[2])
        self.xp.add(dy[:, None], dx[None], out=squares)
        self.xp.minimum(distances, squares, out=distances)
