"""Counter-based random bits: a pure function of integer keys, the same on every device and for every batch.

Nothing here has state, so a draw that belongs to (seed, image i) or (seed, step, sample) can be made anywhere, in any
order, by any number of processes.
"""

from __future__ import annotations

import torch


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of an int32 or int64 tensor (torch's `>>` carries the sign)."""
    width = torch.iinfo(x.dtype).bits
    return (x >> bits) & ((1 << (width - bits)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64 finaliser (Steele, Lea & Flood, 2014) on int64, arithmetic modulo 2^64."""
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9 as a signed number
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94d049bb133111eb
    return x ^ _shift_right(x, 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """32-bit integer hash with low bias (C. Wellons, `lowbias32`) on int32, arithmetic modulo 2^32."""
    x = (x ^ _shift_right(x, 16)) * 0x7FEB352D
    x = (x ^ _shift_right(x, 15)) * -0x7B935975  # 0x846ca68b
    return x ^ _shift_right(x, 16)


def _low_word(x: torch.Tensor) -> torch.Tensor:
    """Lower 32 bits of an int64 tensor as int32, without a conversion that overflows."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def fold_in(key: torch.Tensor, data: torch.Tensor | int) -> torch.Tensor:
    """New int64 keys from keys and integers, elementwise with broadcasting; different data give unrelated keys."""
    golden = -0x61C8864680B583EB  # 0x9e3779b97f4a7c15, the SplitMix64 increment
    data = torch.as_tensor(data, dtype=torch.int64, device=key.device)
    return _mix64(_mix64(key + golden) + (data + 1) * golden)


def random_bits(keys: torch.Tensor, count: int) -> torch.Tensor:
    """`count` uniform integers in [0, 2^31) per key, int32 of shape keys.shape + (count,).

    Two rounds of a 32-bit hash, one keyed with the lower, one with the upper half of the 64-bit key.
    """
    low, high = (_low_word(half)[..., None] for half in (keys, _shift_right(keys, 32)))
    counters = torch.arange(count, device=keys.device, dtype=torch.int32)
    return _mix32(_mix32(counters ^ low) + high) & 0x7FFFFFFF
