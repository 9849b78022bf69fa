"""Streaming statistics and files of reference statistics, against independent computations."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine.scoring.statistics as statistics_module
from engine.scoring.features import INCEPTION, FeatureExtractor
from engine.scoring.statistics import (
    FeatureStatistics,
    ReferenceStatistics,
    load_reference_statistics,
    save_reference_statistics,
)
from tests.helpers.features import features_of, statistics_of
from util.dist import Dist
from util.errors import UserError


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
        ({"mu": np.zeros(3)}, r"bad\.npz has no array 'sigma'; it holds mu"),
        ({"arr_0": np.zeros(3), "arr_1": np.zeros(3)}, r"bad\.npz has no array 'mu'; it holds arr_0, arr_1"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "shape"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, "shape"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "finite"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "readable"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "readable"),
        ({"mu": np.zeros(2), "sigma": np.diag([1, -0.5])}, "negative eigenvalues"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "negative eigenvalues"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])}, "symmetric"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)}, "no array 'sigma_s'"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.eye(3)}, "mu_s and sigma_s"),
    ],
)
def test_bad_reference_statistics_are_refused(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_reference_statistics(tmp_path / "bad.npz")


def test_rounded_covariances_are_read(tmp_path: Path) -> None:
    """Those of few images, written in float32, have eigenvalues slightly below zero."""
    mu, sigma = statistics_of(features_of(20, 256, seed=0))
    assert np.linalg.eigvalsh(sigma.astype(np.float32).astype(np.float64))[0] < 0
    np.savez(tmp_path / "few.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    np.testing.assert_allclose(load_reference_statistics(tmp_path / "few.npz").sigma, sigma, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("samples", [None, np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 9, 3), np.uint8)])
def test_the_adm_suite_needs_images_as_bytes(tmp_path: Path, samples: np.ndarray | None) -> None:
    """Images as floats of 0 to 1 would be taken for black ones."""
    spatial: dict[str, Any] = {"mu_s": np.zeros(4), "sigma_s": np.eye(4)}

    def reference(**arrays: Any) -> ReferenceStatistics:
        np.savez(tmp_path / "r.npz", mu=np.zeros(2), sigma=np.eye(2), **spatial, **arrays)
        return load_reference_statistics(tmp_path / "r.npz")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics_module, "SPATIAL_DIM", 4)
        reference(arr_0=np.zeros((2, 8, 8, 3), np.uint8)).check_adm_suite(8)
        with pytest.raises(UserError, match="uint8"):
            reference(**({} if samples is None else {"arr_0": samples})).check_adm_suite(8)


def test_damaged_reference_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
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
