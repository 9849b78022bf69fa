"""Floating point operations of the model's matrix products, two per multiply-add; everything else is left out.

Attention is counted by the pairs of rows that the mask allows, not by the dense product of all rows. Shape legend: `L`
tokens of an image, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.lpd import LPDConfig


def _forward_flops(config: LPDConfig, group_sizes: Sequence[int]) -> int:
    """One image through the whole model: each group once as queries and, but for the last, once as context."""
    L, D = config.num_tokens, config.embed_dim
    rows = 1 + L - group_sizes[-1] + L
    pairs, known, last = 1, 1, 1  # the class token sees itself
    for size in group_sizes:
        pairs += size * (known + size)  # queries: what is known, and each other
        known += size
        last = size * known  # as context: what is known by then, itself included
        pairs += last
    pairs -= last
    per_row = 4 * D * D + 2 * D * int(D * config.mlp_ratio)  # multiply-adds of qkv, proj, fc1, fc2
    return 2 * config.depth * (rows * per_row + pairs * 2 * D) + 2 * L * D * config.vocab_size


def training_flops(config: LPDConfig) -> int:
    """FLOPs to train on one image: forward, and twice as much backward; what checkpointing recomputes is not counted.

    Counted for steps of one token; other schedules differ by less than 2 %. Of the L context rows, whose outputs nobody
    reads, the last layer only needs keys and values.
    """
    L, D = config.num_tokens, config.embed_dim
    unread = 2 * L * (2 * D * D + 2 * D * int(D * config.mlp_ratio))
    return 3 * (_forward_flops(config, [1] * L) - unread)


def decoding_flops(config: LPDConfig, group_sizes: Sequence[int], guided: bool) -> int:
    """FLOPs to decode the codes of one image with a key/value cache; guidance decodes every image twice."""
    return (2 if guided else 1) * _forward_flops(config, group_sizes)
