"""FLOP counts: the figures of the published sizes, and a count by torch of the products that really run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import build_model, model_config
from models.flops import decoding_flops, training_flops
from orders import group_sizes


@pytest.mark.parametrize(
    ("name", "img_size", "steps", "gflop"),
    [
        ("lpd_l", 256, 20, 626),
        ("lpd_xl", 256, 20, 1443),
        ("lpd_xxl", 256, 20, 2746),
        ("lpd_l", 512, 48, 2713),
        ("lpd_xl", 512, 48, 6185),
    ],
)
def test_guided_decoding_of_the_published_sizes(name: str, img_size: int, steps: int, gflop: float) -> None:
    config = model_config(name, img_size=img_size)
    assert decoding_flops(config, group_sizes(img_size, steps), guided=True) / 1e9 == pytest.approx(gflop, rel=0.005)


def test_training_flops_are_those_of_the_products_that_run() -> None:
    """A share of peak that counts work nobody does, or half of it, would mislead every tuning of the step.

    Attention is left out of the comparison (torch counts masked pairs as well): its share is 4·D·pairs per layer.
    """
    options = {"img_size": 128, "embed_dim": 64, "depth": 3, "class_num": 2, "vocab_size": 96}
    model = build_model("lpd_debug", **options)
    L, D = 64, 64
    tokens, orders = torch.randint(96, (1, L)), torch.randperm(L)[None]
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.zeros(1, dtype=torch.int64), orders, [1] * L).sum().backward()
    products = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if str(operation) in ("aten.mm", "aten.addmm", "aten.bmm")
    )
    # Context row t and query t + 1 both see t + 1 rows: L(L+1) pairs per layer.
    attention = 3 * 3 * 4 * D * L * (L + 1)
    assert training_flops(model.config) - attention == pytest.approx(products, rel=0.03)
