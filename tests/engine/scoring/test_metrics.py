"""Fréchet distance, Inception Score, precision and recall, against independent computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from engine.scoring.metrics import frechet_distance, inception_score, precision_recall, score
from engine.scoring.statistics import FeatureStatistics, load_reference_statistics, save_reference_statistics
from tests.helpers.features import features_of, statistics_of
from util.errors import UserError


def test_frechet_distance_equals_scipy_and_torch_fidelity() -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    mu1, sigma1 = statistics_of(features_of(2000, 64, seed=0))
    mu2, sigma2 = statistics_of(features_of(2000, 64, seed=1))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    by_scipy = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)
    pair = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
    by_torch_fidelity = fid.fid_statistics_to_metric(*pair, verbose=False)[fid.KEY_METRIC_FID]
    distance = frechet_distance(mu1, sigma1, mu2, sigma2)
    assert distance == pytest.approx(by_scipy, rel=1e-6)
    assert distance == pytest.approx(by_torch_fidelity, rel=1e-6)


def test_frechet_distance_of_singular_covariances() -> None:
    """Few images: a matrix root of a singular product gives complex numbers or noise; the exact value is known here."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    values1 = np.r_[rng.uniform(0.1, 5, 10), np.zeros(30)]
    values2 = np.r_[np.zeros(5), rng.uniform(0.1, 5, 15), np.zeros(20)]
    sigma1, sigma2 = ((rotation * values) @ rotation.T for values in (values1, values2))
    mu1, mu2 = rng.standard_normal((2, 40))
    exact = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(values1) - np.sqrt(values2)) ** 2)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(exact, rel=1e-9)


def test_frechet_distance_of_equal_and_of_constant_features() -> None:
    mu, sigma = statistics_of(features_of(20, 64, seed=0))  # 20 images cannot determine 64 features
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9 * np.trace(sigma))
    zero = np.zeros_like(sigma)
    assert frechet_distance(mu, zero, mu + 1, zero) == pytest.approx(64)
    assert frechet_distance(mu, sigma, mu, zero) == pytest.approx(np.trace(sigma))


def test_a_negative_frechet_distance_is_an_error() -> None:
    """No covariance gives one; as zero it would pass for a perfect score."""
    indefinite = np.diag([1.0, -5.0])
    with pytest.raises(UserError, match="is -10"):
        frechet_distance(np.zeros(2), indefinite, np.zeros(2), indefinite)


def test_inception_score_by_hand() -> None:
    """The score must be the mean over ten splits, shuffled as torch-fidelity does."""
    logits = torch.randn(53, 7, dtype=torch.float64) * 3
    shuffled = logits[np.random.RandomState(2020).permutation(53)].softmax(1).numpy()
    scores = []
    for i in range(10):
        p = shuffled[i * 53 // 10 : (i + 1) * 53 // 10]
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1))))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric(logits)
    assert inception_score(logits) == pytest.approx(tuple(theirs.values()))


def test_inception_score_of_extreme_logits() -> None:
    """Probabilities that underflow must count as zero: their logarithm is infinite, and infinity times zero NaN."""
    assert inception_score(torch.tensor([[0.0, -2000.0]]).repeat(20, 1)) == (1, 0)


def test_inception_score_of_images_sorted_by_class_is_not_capped() -> None:
    """Without shuffling each tenth of sorted images holds a tenth of the classes, and 100 classes score 10."""
    logits = 50.0 * torch.eye(100).repeat_interleave(20, dim=0)
    assert inception_score(logits)[0] > 50


def test_precision_and_recall_by_hand() -> None:
    """Guards against swapped arguments and another neighbour than the third."""
    generated, real = torch.randn(60, 3), torch.randn(40, 3) * 1.5 + 0.7

    def share_inside(points: torch.Tensor, manifold: torch.Tensor) -> float:
        distances = (manifold[:, None] - manifold[None]).norm(dim=-1)
        radii = distances.sort(dim=1).values[:, 3]  # 0 is the point itself
        return float(((points[:, None] - manifold[None]).norm(dim=-1) <= radii).any(1).float().mean())

    precision, recall = share_inside(generated, real), share_inside(real, generated)
    assert precision != recall
    assert precision_recall(generated, real) == pytest.approx((precision, recall))


def test_precision_and_recall_keep_digits_far_from_the_origin() -> None:
    """Distances are far smaller than the norms here, as between features after a pooling: float32 cancels."""
    generated, real = (torch.randn(200, 16) * 0.01 + 10 for _ in range(2))

    def share_inside(points: torch.Tensor, manifold: torch.Tensor) -> float:
        distances = torch.cdist(manifold.double(), manifold.double(), compute_mode="donot_use_mm_for_euclid_dist")
        radii = distances.kthvalue(4).values  # the first is the point itself
        between = torch.cdist(points.double(), manifold.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return float((between <= radii).any(1).double().mean())

    exact = share_inside(generated, real), share_inside(real, generated)
    assert precision_recall(generated, real) == pytest.approx(exact, abs=1e-6)


def test_score_warns_of_too_few_images(tmp_path: Path) -> None:
    """A distance from fewer images than features must not pass as a figure to publish."""
    few, many = (FeatureStatistics(4) for _ in range(2))
    few.update(torch.randn(4, 4))
    many.update(torch.randn(100, 4))
    save_reference_statistics(tmp_path / "r.npz", many, {"extractor": "x"})
    reference = load_reference_statistics(tmp_path / "r.npz")
    assert score(many, torch.randn(100, 3), reference, "x")["warnings"] == []
    scores = score(few, torch.randn(4, 3), reference, "x")
    assert "4 images" in scores["warnings"][0]
    assert scores["frechet_distance"] > 0
    assert "fid" not in scores, "only Inception's distance is called FID"
    assert "inception_score" not in scores, "ten splits need ten images"
