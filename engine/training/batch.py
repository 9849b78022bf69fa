"""What a step trains on: the codes of images, mirrored or not, the orders to learn, and whose class is dropped.

Shape legend: `B` samples of this process, `L` tokens of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from orders.config import OrderConfig
from tokenizers import VQModel, exact_precision
from util.counter_rng import fold_in, random_bits
from util.pictures import to_float

_MIXTURE = 1  # tells the keys of these draws from those of a sample's other ones

# tokens (B, L) raster, labels (B,), orders (B, L), label_drop (B,)
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def draw_samples(
    seed: int,
    step: int,
    rows: range,
    num_tokens: int,
    flip_prob: float,
    label_drop_prob: float,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is random about some `rows` of the global batch of a step; other rows don't matter.

    Returns:
        orders (B, L) int64, uniformly random permutations; flip (B,) bool, mirrored or not; label_drop (B,) bool.
    """
    # Made on the host and filled in: copying a number to the device would wait for it.
    key = torch.full((), int(fold_in(torch.tensor(seed), step)), dtype=torch.int64, device=device)
    keys = fold_in(key, torch.arange(rows.start, rows.stop, device=device))
    bits = random_bits(keys, num_tokens + 2)
    orders = bits[:, :num_tokens].argsort(dim=1, stable=True)
    uniform = (bits[:, num_tokens:] >> 7).float() * 2.0**-24
    return orders, uniform[:, 0] < flip_prob, uniform[:, 1] < label_drop_prob


class OrderMixture:
    """Training orders of several kinds, drawn as in decoding, with its default thresholds.

    Which kind a sample has, and which order, follows from (seed, step, row) and the group sizes of the step alone.
    All is drawn on the host.

    Args:
        shares: how often each kind is taken, by kind; they sum to 1.
        schedules: all group sizes to come.

    Raises:
        UserError: for a schedule that one of the kinds cannot follow.
    """

    def __init__(
        self, shares: Mapping[str, float], grid_size: int, schedules: Sequence[Sequence[int]], seed: int
    ) -> None:
        self.kinds, self.seed = list(shares), seed
        self.bounds = torch.tensor(list(shares.values())).cumsum(0)[:-1]
        self.specs = {
            (kind, sizes): OrderConfig(order=kind, group_sizes=sizes).for_grid(grid_size, seed).spec
            for kind in shares
            for sizes in map(tuple, schedules)
            if kind != "random"
        }

    def mix(self, orders: torch.Tensor, step: int, rows: range, group_sizes: Sequence[int]) -> torch.Tensor:
        """`orders` (B, L) int64, the random ones of `rows`, with those of the other kinds in the place of some."""
        if not self.specs:
            return orders
        key = fold_in(torch.tensor(self.seed), step)
        keys = fold_in(fold_in(key, torch.arange(rows.start, rows.stop)), _MIXTURE)
        uniform = (random_bits(keys, 1)[:, 0] >> 7).float() * 2.0**-24
        kinds = torch.bucketize(uniform, self.bounds, right=True).numpy()
        numbers = (keys & (1 << 63) - 1).numpy()
        mixed = torch.full(orders.shape, -1, dtype=torch.int64)
        for number, kind in enumerate(self.kinds):
            own = np.flatnonzero(kinds == number)
            if kind != "random":
                drawn = self.specs[kind, tuple(group_sizes)].draw(numbers[own], workers=1)
                mixed[torch.from_numpy(own)] = torch.from_numpy(drawn).long()
        if orders.device.type == "cuda":  # a copy from other memory would wait for the device
            mixed = mixed.pin_memory()
        mixed = mixed.to(orders.device, non_blocking=True)
        return torch.where(mixed < 0, orders, mixed)


def codes_of(data: list[torch.Tensor], flip: torch.Tensor, tokenizer: VQModel | None) -> torch.Tensor:
    """Codes (B, L) of the pictures, mirrored where `flip` (B,) says so: looked up, or encoded by the tokenizer."""
    if tokenizer is None:
        codes, codes_flip = data
        return torch.where(flip[:, None], codes_flip, codes)
    images = to_float(data[0])
    with torch.no_grad(), exact_precision():
        return tokenizer.encode(torch.where(flip[:, None, None, None], images.flip(-1), images))
