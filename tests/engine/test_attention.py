"""Attention by distance: against loops over single pairs, and the same while decoding as in the training pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from engine.attention import AttentionByDistance, in_training_pass, while_decoding
from engine.generate import generate
from models.lpd import LPD, LPDConfig
from models.sampling import Sampling
from orders import generate_orders
from tests.helpers.tiny_models import far_from_initialisation

GRID, SIZES, IMAGES = 4, (1, 3, 5, 7), 3
SEEDS, LABELS = torch.arange(IMAGES), torch.tensor([0, 2, 1])


@pytest.fixture
def model() -> LPD:
    config = LPDConfig(img_size=16, stride=4, embed_dim=16, depth=2, num_heads=2, class_num=3, vocab_size=12)
    return far_from_initialisation(LPD(config).double(), 0.3).eval()


@pytest.fixture
def orders() -> torch.Tensor:
    return torch.from_numpy(generate_orders("lpd", IMAGES, SIZES, GRID)).long()


def empty(model: LPD) -> AttentionByDistance:
    return AttentionByDistance(model.config.depth, model.config.num_heads, GRID)


def assert_same(one: Any, other: Any) -> None:
    """The same numbers in the same nested plain data."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        np.testing.assert_allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_decoding_attends_as_the_training_pass(model: LPD, orders: torch.Tensor, cfg: float) -> None:
    """Same codes, same attention: guards against rows at wrong positions, and measuring the half without class."""
    decoded, trained = empty(model), empty(model)
    codes = generate(model, LABELS, orders, SIZES, cfg=cfg, seeds=SEEDS)
    while_decoding(model, LABELS, orders, SEEDS, SIZES, Sampling(cfg=cfg), decoded)
    in_training_pass(model, codes, LABELS, orders, SIZES, trained)
    assert_same(decoded.figures(), trained.figures())
    without_class = empty(model)
    while_decoding(model, LABELS * 0, orders, SEEDS, SIZES, Sampling(cfg=cfg), without_class)
    assert without_class.figures() != decoded.figures()


def test_figures_are_those_of_loops_over_pairs() -> None:
    """One layer, one head, two batches: weights by hand, bins by hand."""
    torch.manual_seed(0)
    measured = AttentionByDistance(1, 1, GRID)
    visible = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()  # class, two codes, two queries
    per_token: dict[tuple[str, int], list[float]] = {}
    even: dict[tuple[str, int], list[float]] = {}
    shares: dict[str, float] = dict.fromkeys(("class_token", "context", "same_step", "itself"), 0.0)
    for _ in range(2):
        query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 5, 4)
        cells = torch.randperm(GRID**2)[:4].tolist()
        queries = cells[2:]
        measured.add(0, query, key, torch.tensor([queries]), torch.tensor([[-1, *cells]]), 3, visible)
        for row, target in enumerate(queries):
            score = {c: math.exp(float(query[0, 0, row] @ key[0, 0, c]) / 2) for c in range(5) if visible[row, c]}
            found: dict[tuple[str, int], list[float]] = {}
            for column, value in score.items():
                weight = value / sum(score.values())
                if column == 0:
                    shares["class_token"] += weight / 4
                    continue
                cell = cells[column - 1]
                distance = round(math.dist(divmod(cell, GRID), divmod(target, GRID)))
                kind = "context" if column < 3 else "same_step"
                shares["itself" if cell == target else kind] += weight / 4
                if cell != target:
                    found.setdefault((kind, distance), []).append(weight)
            for place, weights in found.items():
                per_token.setdefault(place, []).append(float(np.mean(weights)))
                even.setdefault(place, []).append(1 / len(score))
    figures = measured.figures()
    assert figures["num_queries"] == 4
    for kind in ("context", "same_step"):
        distances = sorted(distance for name, distance in per_token if name == kind)
        assert figures[kind]["distances"] == distances
        means = [[np.mean(found[kind, d]) for d in distances] for found in (per_token, even)]
        np.testing.assert_allclose(figures[kind]["per_token"][0][0], means[0])
        np.testing.assert_allclose(figures[kind]["even"], means[1])
    assert {name: pytest.approx(values[0][0]) for name, values in figures["shares"].items()} == shares


def test_blind_heads_attend_evenly(model: LPD, orders: torch.Tensor) -> None:
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)  # type: ignore[union-attr,arg-type]
        torch.nn.init.zeros_(block.attn.qkv.bias)  # type: ignore[union-attr,arg-type]
    measured = empty(model)
    while_decoding(model, LABELS, orders, SEEDS, SIZES, Sampling(), measured)
    figures = measured.figures()
    assert figures["num_queries"] == IMAGES * GRID**2
    for kind in ("context", "same_step"):
        found = np.array(figures[kind]["per_token"])
        np.testing.assert_allclose(found, np.broadcast_to(figures[kind]["even"], found.shape))
    np.testing.assert_allclose(sum(np.array(share) for share in figures["shares"].values()), 1)
