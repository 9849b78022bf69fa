"""What a step trains on: the codes of images, mirrored or not, the orders to learn, and whose class is dropped.

Shape legend: `B` samples of this process, `L` tokens of an image.
"""

from __future__ import annotations

import torch

from tokenizers import VQModel, exact_precision
from util.counter_rng import fold_in, random_bits
from util.pictures import to_float

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


def codes_of(data: list[torch.Tensor], flip: torch.Tensor, tokenizer: VQModel | None) -> torch.Tensor:
    """Codes (B, L) of the pictures, mirrored where `flip` (B,) says so: looked up, or encoded by the tokenizer."""
    if tokenizer is None:
        codes, codes_flip = data
        return torch.where(flip[:, None], codes_flip, codes)
    images = to_float(data[0])
    with torch.no_grad(), exact_precision():
        return tokenizer.encode(torch.where(flip[:, None, None, None], images.flip(-1), images))
