"""Counter-based random bits: a pure function of integer keys, the same on every device and for every batch.

Nothing here has state, so a draw that belongs to (seed, image i) or (seed, step, sample) can be made anywhere, in any
order, by any number of processes.
"""

from __future__ import annotations

import torch

from util.splitmix import GOLDEN, mix, shift_right, signed


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """32-bit integer hash with low bias (C. Wellons, `lowbias32`) on int32, arithmetic modulo 2^32."""
    x = (x ^ shift_right(x, 16, 32)) * 0x7FEB352D
    x = (x ^ shift_right(x, 15, 32)) * signed(0x846CA68B, 32)
    return x ^ shift_right(x, 16, 32)


def _low_word(x: torch.Tensor) -> torch.Tensor:
    """Lower 32 bits of an int64 tensor as int32, without a conversion that overflows."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def fold_in(key: torch.Tensor, data: torch.Tensor | int) -> torch.Tensor:
    """New int64 keys from keys and integers, elementwise with broadcasting; different data give unrelated keys."""
    golden = signed(GOLDEN)
    data = torch.as_tensor(data, dtype=torch.int64, device=key.device)
    return mix(mix(key + golden) + (data + 1) * golden)


def random_bits(keys: torch.Tensor, count: int) -> torch.Tensor:
    """`count` uniform integers in [0, 2^31) per key, int32 of shape keys.shape + (count,).

    Two rounds of a 32-bit hash, one keyed with the lower, one with the upper half of the 64-bit key.
    """
    low, high = (_low_word(half)[..., None] for half in (keys, shift_right(keys, 32)))
    counters = torch.arange(count, device=keys.device, dtype=torch.int32)
    return _mix32(_mix32(counters ^ low) + high) & 0x7FFFFFFF
