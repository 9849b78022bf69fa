"""What the training of a tokenizer reads: training and held-out images, and shuffled batches from any step on."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, Subset

from util.data.loading import Images, load_all, load_batches
from util.errors import UserError

_IN_MEMORY_BYTES = 2 * 2**30  # a data set up to this size is decoded once and kept on the device
_HELD_OUT_MAX = 2000  # images


def split(dataset: Images, held_out: float, seed: int) -> tuple[Images, Images]:
    """Training and held-out images, drawn by the seed. UserError for fewer than two images."""
    count = len(dataset)
    if count < 2:
        raise UserError(f"{count} image(s) are too few: some train the tokenizer and others measure it.")
    kept = min(max(1, round(held_out * count)), _HELD_OUT_MAX, count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, order[kept:]), Subset(dataset, order[:kept])  # type: ignore[arg-type]


def read_batches(
    train_set: Images, steps: range, batch_size: int, seed: int, num_workers: int, device: torch.device
) -> Generator[Tensor, None, None]:
    """The uint8 batches (B, H, H, 3) of these steps, on the device; every image comes once before any comes again.

    What a step gets depends on its number and the seed alone. To be closed, which ends the reading processes.
    """
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(train_set, num_samples=steps.stop * batch_size, generator=generator)
    rows = itertools.islice(BatchSampler(sampler, batch_size, drop_last=False), steps.start, None)
    if steps and len(train_set) * train_set[0][0].numel() <= _IN_MEMORY_BYTES:
        images = load_all(train_set, max(1, num_workers))[0].to(device)
        return (images[torch.tensor(batch)] for batch in rows)
    return (images for images, _ in load_batches(train_set, rows, num_workers, device))


def flip_half(batch: Tensor) -> Tensor:
    """Mirror about half of the images (B, H, H, 3), drawn from torch's generator."""
    mirrored = torch.rand(len(batch), 1, 1, 1, device=batch.device) < 0.5
    return torch.where(mirrored, batch.flip(2), batch)
