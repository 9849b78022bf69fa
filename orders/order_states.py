"""The random numbers of orders: each follows from (seed, order number, step, cell) alone.

They are integer hashes, so NumPy and torch give the same bits on every device, in any batch and on any number of
workers. ``xp`` is the array module (``numpy`` or ``torch``); ``N`` counts orders, ``L`` cells.
"""

from __future__ import annotations

from typing import Any

from util.splitmix import GOLDEN, mix, shift_right, signed


def _spread(numbers: Any) -> Any:
    """(n + 1) times the golden increment, modulo 2^64, of an int or an int64 array."""
    if isinstance(numbers, int):
        return signed((numbers + 1) * GOLDEN, 64)
    return (numbers + 1) * signed(GOLDEN)


def order_states(indices: Any, seed: int) -> Any:
    """A 64-bit state per order: int64 order numbers (N,) to int64 (N,)."""
    seed_state = mix(indices * 0 + signed(seed + GOLDEN, 64))
    return mix(seed_state + _spread(indices))


def sub_states(states: Any, numbers: Any) -> Any:
    """The states number 0, 1, … derived from ``states`` (one per step, say): int or int64 array, broadcast."""
    return mix(states + _spread(numbers))


def uniform_cells(states: Any, num_cells: int) -> Any:
    """A uniformly random cell 0 … num_cells−1 per state, int64."""
    return (shift_right(states, 32) * num_cells) >> 32


class TieKeys:
    """Per state one int32 key for each of the L cells: random bits above the cell's own number.

    Keys of one state are distinct, so the largest of any subset is one cell, each with the same probability, and its
    low ``index_bits`` bits name it. A two-round multiplicative hash on 32 bits: a full hash would cost more time than
    the rest of a step.
    """

    def __init__(self, xp: Any, num_cells: int, key_bits: int, device: Any = "cpu") -> None:
        self.xp = xp
        self.index_bits = (num_cells - 1).bit_length()
        self.index_mask = (1 << self.index_bits) - 1
        self._random_mask = ((1 << key_bits) - 1) ^ self.index_mask
        self._cells = xp.arange(num_cells, dtype=xp.int32, device=device)[:, None]
        self._constants = xp.empty((num_cells, 1), dtype=xp.int32, device=device)
        self._constants[:, 0] = mix(_spread(xp.arange(num_cells, dtype=xp.int64, device=device))) >> 32

    def draw(self, states: Any, out: Any, scratch: Any) -> Any:
        """Fill ``out`` (L, N), int32, with the keys of ``states`` (N,); ``scratch`` is of the same shape."""
        xp = self.xp
        high, low = xp.empty_like(out[0]), xp.empty_like(out[0])
        high[...] = states >> 32
        low[...] = (states << 32) >> 32
        xp.add(self._constants, high, out=out)
        out *= 0x7FEB352D
        xp.bitwise_right_shift(out, 16, out=scratch)
        out ^= scratch
        out ^= low
        out *= signed(0x846CA68B, 32)
        xp.bitwise_right_shift(out, 15, out=scratch)
        out ^= scratch
        out &= self._random_mask
        out |= self._cells
        return out
