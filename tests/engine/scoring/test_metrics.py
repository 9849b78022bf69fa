"""Fréchet distance, streaming statistics, Inception Score and reference files, against independent computations."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from engine.scoring.features import INCEPTION, FeatureExtractor
from engine.scoring.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    load_reference_statistics,
    precision_recall,
    save_reference_statistics,
    score,
)
from util.dist import Dist
from util.errors import UserError


def features_of(num: int, dim: int, seed: int) -> np.ndarray:
    """Correlated Gaussian features (num, dim) float64."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num, dim)) @ rng.standard_normal((dim, dim)) + rng.standard_normal(dim)


def statistics_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def extractor(name: str = INCEPTION, dim: int = 4, weights_hash: str = "0" * 64) -> FeatureExtractor:
    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = images.flatten(1).float()
        return flat[:, :dim], flat[:, :2]

    return FeatureExtractor(name, dim, ("a", "b"), weights_hash, torch.device("cpu"), forward)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_statistics_equal_numpy(offset: float) -> None:
    """Guards against a sum of squares that cancels where the mean is large, and against batches weighted alike."""
    features = torch.from_numpy(features_of(257, 12, seed=0) + offset)
    statistics = FeatureStatistics(12)
    for batch in features.split([1, 100, 0, 5, 151]):
        statistics.update(batch)
    mu, sigma = statistics_of(features.numpy())
    assert statistics.count == 257
    np.testing.assert_allclose(statistics.mu(), mu, rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma(), sigma, rtol=1e-9, atol=1e-9)


def test_statistics_do_not_round_to_float32() -> None:
    """Float32 batches far from zero must be accumulated in float64."""
    features = (torch.randn(4000, 3) + 300).float()
    statistics = FeatureStatistics(3)
    for batch in features.split(7):
        statistics.update(batch)
    np.testing.assert_allclose(statistics.sigma(), np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)


@dataclass(frozen=True)
class ThreadDist(Dist):
    """Threads in the place of processes: all of them share ``slots``, one per rank."""

    slots: list
    meet: threading.Barrier

    def gather(self, value: Any) -> list:
        self.slots[self.rank] = value
        self.meet.wait()
        values = list(self.slots)
        self.meet.wait()
        return values

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))


def test_merging_processes_equals_one_process() -> None:
    """Unequal shares, an empty one among them, must be weighted by their counts."""
    features = torch.from_numpy(features_of(50, 6, seed=1) + 100)
    shares = [FeatureStatistics(6) for _ in range(3)]
    shares[0].update(features[:9])
    shares[2].update(features[9:])
    slots, barrier = [None] * 3, threading.Barrier(3, timeout=20)
    dists = [ThreadDist(rank, 3, torch.device("cpu"), slots, barrier) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda rank: shares[rank].merge_processes(dists[rank]), range(3)))
    mu, sigma = statistics_of(features.numpy())
    for share in shares:
        assert share.count == 50
        np.testing.assert_allclose(share.mu(), mu, rtol=1e-12)
        np.testing.assert_allclose(share.sigma(), sigma, rtol=1e-9, atol=1e-9)


def test_frechet_distance_equals_scipy_and_torch_fidelity() -> None:
    mu1, sigma1 = statistics_of(features_of(2000, 64, seed=0))
    mu2, sigma2 = statistics_of(features_of(2000, 64, seed=1))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    by_scipy = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)
    pair = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
    by_torch_fidelity = fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]
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


def test_inception_score_by_hand() -> None:
    """The score must be the mean over ten splits, shuffled as torch-fidelity does."""
    logits = torch.randn(53, 7, dtype=torch.float64) * 3
    shuffled = logits[np.random.RandomState(2020).permutation(53)].softmax(1).numpy()
    scores = []
    for i in range(10):
        p = shuffled[i * 53 // 10 : (i + 1) * 53 // 10]
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1))))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))


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


def test_reference_statistics_come_back(tmp_path: Path) -> None:
    statistics = FeatureStatistics(4)
    statistics.update(torch.randn(30, 4))
    metadata = {"extractor": "net", "extractor_sha256": "ab" * 32, "img_size": 8, "num_images": 30}
    save_reference_statistics(tmp_path / "r.npz", statistics, metadata)
    reference = load_reference_statistics(tmp_path / "r.npz")
    np.testing.assert_array_equal(reference.mu, statistics.mu())
    np.testing.assert_array_equal(reference.sigma, statistics.sigma())
    assert reference.metadata == metadata
    reference.check(extractor("net", 4, "ab" * 32), img_size=8)
    for other, size in (
        (extractor("other", 4, "ab" * 32), 8),
        (extractor("net", 5, "ab" * 32), 8),
        (extractor("net", 4, "cd" * 32), 8),
        (extractor("net", 4, "ab" * 32), 16),
    ):
        with pytest.raises(UserError, match="statistics of"):
            reference.check(other, size)


def test_published_statistics_are_inceptions(tmp_path: Path) -> None:
    """Files without metadata (ADM, VIRTUAL_*) must not be taken for a classifier's of the same dimension."""
    arrays: dict[str, Any] = {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)}
    np.savez(tmp_path / "VIRTUAL.npz", mu=np.zeros(4, np.float32), sigma=np.eye(4), **arrays)
    reference = load_reference_statistics(tmp_path / "VIRTUAL.npz")
    assert reference.mu.dtype == np.float64
    reference.check(extractor(INCEPTION), img_size=256)
    assert reference.samples == (2, 8, 8, 3)
    assert reference.load_samples().shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="inception-v3-compat"):
        reference.check(extractor("classifier-resnet18"), img_size=256)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "shape"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, "shape"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "symmetric"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "readable"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "readable"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)}, "sigma_s"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.eye(3)}, "mu_s and sigma_s"),
    ],
)
def test_bad_reference_statistics_are_refused(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_reference_statistics(tmp_path / "bad.npz")


def test_damaged_reference_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not exist"):
        load_reference_statistics(tmp_path / "none.npz")
    whole = tmp_path / "whole.npz"
    np.savez(whole, mu=np.zeros(3), sigma=np.eye(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text(json.dumps([1]))
    for name in ("array.npy", "cut.npz", "empty.npz", "text.npz"):
        with pytest.raises(UserError, match="readable"):
            load_reference_statistics(tmp_path / name)
