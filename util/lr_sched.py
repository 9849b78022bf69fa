"""Learning rate as a function of the fractional epoch."""

from __future__ import annotations

import math

LR_SCHEDULES = ("constant", "cosine", "constant+cosine")


def learning_rate(
    epoch: float,
    *,
    schedule: str,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
    lr_decay_start_epoch: float = 0,
) -> float:
    """Linear warm-up from 0 to `lr`, then

    - `constant`: `lr`;
    - `cosine`: half a cosine from `lr` at the end of the warm-up to `min_lr` at `epochs`;
    - `constant+cosine`: `lr` until `lr_decay_start_epoch`, then half a cosine to `min_lr` at `epochs`.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "constant":
        return lr
    start = lr_decay_start_epoch if schedule == "constant+cosine" else warmup_epochs
    if epoch < start:
        return lr
    progress = min(1.0, (epoch - start) / (epochs - start)) if epochs > start else 1.0
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
