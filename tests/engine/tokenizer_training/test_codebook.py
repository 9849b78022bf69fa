"""The codebook of a tokenizer in training: a good start, dead entries revived, use measured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.tokenizer_training.codebook import DeadCodeRevival, codebook_use, kmeans_start
from tokenizers.vq_model import Codebook


def _clusters(number: int, per_cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors close to ``number`` orthogonal centres."""
    centres = torch.eye(number)
    return centres, F.normalize(
        centres.repeat(per_cluster, 1) + 0.01 * torch.randn(number * per_cluster, number), dim=1
    )


def test_kmeans_finds_separate_clusters() -> None:
    """Guards against a start in which two entries share a cluster and another has none."""
    centres, features = _clusters(8, 50)
    codebook = Codebook(32, 8)
    kmeans_start(codebook, features)
    assert (centres @ codebook.entries().T).amax(1).min() > 0.99
    assert torch.bincount(codebook.nearest(features), minlength=32).min() > 0


def test_kmeans_takes_fewer_features_than_entries() -> None:
    codebook = Codebook(32, 8)
    _, features = _clusters(8, 1)
    kmeans_start(codebook, features)
    assert torch.allclose((features @ codebook.entries().T).amax(1), torch.ones(8))


def test_dead_entries_move_to_badly_served_features_and_live_ones_stay() -> None:
    """Guards against collapse: all entries but one sit where no feature is."""
    centres, features = _clusters(8, 50)
    codebook = Codebook(8, 8)
    with torch.no_grad():
        codebook.embedding.weight.copy_(-torch.ones(8, 8))
        codebook.embedding.weight[2] = centres[0]
    optimizer = torch.optim.AdamW(codebook.parameters())
    codebook.lookup(torch.arange(8)).sum().backward()
    optimizer.step()
    codebook.embedding.weight.data[2] = centres[0]
    revival = DeadCodeRevival(codebook)
    revival.count(codebook.nearest(features))
    used = codebook_use(torch.bincount(codebook.nearest(features), minlength=8))[1]
    alive = torch.bincount(codebook.nearest(features), minlength=8) > 0
    assert torch.equal(revival.revive(features, optimizer), (~alive).nonzero().flatten())
    assert torch.equal(codebook.embedding.weight[2], centres[0])
    assert codebook_use(torch.bincount(codebook.nearest(features), minlength=8))[1] > 2 * used
    moments = optimizer.state[codebook.embedding.weight]["exp_avg_sq"]
    assert (moments[~alive] == 0).all()
    assert (moments[alive] > 0).any()


def test_revival_counts_from_zero_after_each_check() -> None:
    """Guards against counts of long ago keeping a dead entry."""
    codebook = Codebook(4, 4)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.eye(4))
    optimizer = torch.optim.AdamW(codebook.parameters())
    revival = DeadCodeRevival(codebook)
    features = F.normalize(torch.randn(100, 4), dim=1)
    revival.count(torch.arange(4).repeat(50))
    assert revival.revive(features, optimizer).tolist() == []
    revival.count(torch.tensor([0, 1, 2] * 50))
    assert revival.revive(features, optimizer).tolist() == [3]
    assert torch.equal(codebook.embedding.weight[:3], torch.eye(4)[:3])


def test_codebook_use_of_known_counts() -> None:
    assert codebook_use(torch.tensor([5, 5, 5, 5])) == pytest.approx((1.0, 4.0))
    assert codebook_use(torch.tensor([7, 0, 0, 0])) == pytest.approx((0.25, 1.0))
