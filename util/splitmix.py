"""SplitMix64's mixing (Steele, Lea & Flood, OOPSLA 2014) on signed integers that wrap around.

The same code for NumPy and torch int64 arrays, so the bits are the same on every device.
"""

from __future__ import annotations

from typing import Any

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment


def signed(value: int, bits: int = 64) -> int:
    """The signed integer of so many bits that is `value` modulo 2^bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def shift_right(x: Any, by: int, bits: int = 64) -> Any:
    """Logical right shift of an array of signed integers of so many bits (`>>` carries the sign)."""
    return (x >> by) & ((1 << (bits - by)) - 1)


def mix(x: Any) -> Any:
    """The finaliser, int64 to int64: every input bit changes every output bit with probability one half."""
    x = (x ^ shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift_right(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ shift_right(x, 31)
