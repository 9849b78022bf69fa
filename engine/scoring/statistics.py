"""Statistics of features: gathered from images in batches, or read from a file of reference statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import INCEPTION, SPATIAL_DIM, FeatureExtractor
from util.dist import Dist
from util.errors import UserError, reading
from util.files import atomic_write, sha256
from util.readers import load_arrays, stored_array

Array = NDArray[np.float64]
WHAT = "file of reference statistics"  # in messages
COVARIANCE_ROUNDING = 1e-5  # share of its trace that a covariance written in float32 may be off by, with a margin


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64; the features are not kept.

    Batches and processes are merged by the pairwise update of Chan, Golub & LeVeque (1979), which does not lose digits
    where the mean is large beside the spread.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # Σ (x − mean)(x − mean)ᵀ

    def update(self, features: Tensor) -> None:
        """Add features (B, d), any floating type."""
        if len(features) == 0:
            return
        batch = features.to(self._mean)
        mean = batch.mean(0)
        centred = batch - mean
        total = self.count + len(batch)
        shift = mean - self._mean
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self.count = total

    def merge_processes(self, dist: Dist) -> None:
        """Add up what all processes have seen; afterwards each holds the statistics of all features."""
        counts = dist.gather(self.count)
        mean = dist.sum_(self._mean * (self.count / sum(counts)))
        shift = self._mean - mean
        self._scatter = dist.sum_(self._scatter + torch.outer(shift, shift) * self.count)
        self._mean, self.count = mean, sum(counts)

    def mu(self) -> Array:
        """Mean (d,)."""
        return self._mean.cpu().numpy()

    def sigma(self) -> Array:
        """Unbiased covariance (d, d), of at least two features."""
        return (self._scatter / (self.count - 1)).cpu().numpy()


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean and covariance of the features of real images, and where they come from."""

    path: Path
    sha256: str
    mu: Array  # (d,) float64
    sigma: Array  # (d, d) float64
    metadata: dict[str, Any]  # of python -m engine.metrics; empty for other people's files, which are Inception's
    spatial: tuple[Array, Array] | None = None  # mean and covariance of spatial features, for sFID
    samples: tuple[int, ...] | None = None  # shape (M, H, W, 3) of the real images in the file, if they are uint8

    def check(self, extractor: FeatureExtractor, img_size: int) -> None:
        """Raise UserError unless the statistics are of this extractor's features of images of this size."""
        made_by = self.metadata.get("extractor", INCEPTION)
        same_weights = self.metadata.get("extractor_sha256", extractor.weights_hash) == extractor.weights_hash
        if made_by != extractor.name or not same_weights or len(self.mu) != extractor.feature_dim:
            raise UserError(
                f"{self.path} holds statistics of {len(self.mu)} features of {made_by}, but images are scored with "
                f"{extractor.feature_dim} features of {extractor.name} ({extractor.weights_hash[:12]}…); compute them "
                "with python -m engine.metrics."
            )
        measured = self.metadata.get("img_size", img_size)
        if measured != img_size:
            raise UserError(f"{self.path} holds statistics of {measured} px images, those scored have {img_size} px.")

    def check_adm_suite(self, img_size: int) -> None:
        """Raise UserError unless the file has what sFID, precision and recall need."""
        has_spatial = self.spatial is not None and len(self.spatial[0]) == SPATIAL_DIM
        if not has_spatial or self.samples is None or self.samples[1:] != (img_size, img_size, 3):
            raise UserError(
                f"--adm_suite needs mu_s and sigma_s of {SPATIAL_DIM} features and uint8 images arr_0 of {img_size} "
                f"px, as OpenAI's VIRTUAL_*.npz have them; {self.path} does not."
            )

    def load_samples(self) -> Tensor:
        """The real images of the file as uint8 (M, 3, H, W)."""
        samples = load_arrays(WHAT, self.path, ("arr_0",))["arr_0"]
        return torch.from_numpy(samples).permute(0, 3, 1, 2)


def load_reference_statistics(path: str | Path) -> ReferenceStatistics:
    """Read an npz with `mu` (d,) and `sigma` (d, d): the ADM suite's, OpenAI's ``VIRTUAL_*.npz``, or one made here.

    Raises:
        UserError: if there is no such file, or it does not hold a finite mean and covariance of matching shapes.
    """
    path = Path(path)
    arrays = load_arrays(WHAT, path, (), ("metadata",))
    mu, sigma = _gaussian(path, "mu", "sigma")
    spatial = None if stored_array(WHAT, path, "mu_s") is None else _gaussian(path, "mu_s", "sigma_s")
    with reading(WHAT, path):
        metadata = json.loads(str(arrays["metadata"])) if "metadata" in arrays else {}
        kinds = {"extractor": str, "extractor_sha256": str, "img_size": int}
        if any(not isinstance(metadata.get(name, kind()), kind) for name, kind in kinds.items()):
            raise ValueError("its metadata do not say what it was made of")
    stored = stored_array(WHAT, path, "arr_0")  # gigabytes, of which only the header is read
    samples = stored[0] if stored is not None and stored[1] == np.uint8 else None
    return ReferenceStatistics(path, sha256(path), mu, sigma, metadata, spatial, samples)


def _gaussian(path: Path, mean: str, covariance: str) -> tuple[Array, Array]:
    arrays = load_arrays(WHAT, path, (mean, covariance))
    with reading(WHAT, path):
        mu, sigma = (arrays[name].astype(np.float64, casting="same_kind") for name in (mean, covariance))
    shaped = mu.ndim == 1 and sigma.shape == (len(mu), len(mu))
    if not shaped or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(
            f"{mean} and {covariance} of {path}, with shapes {mu.shape} and {sigma.shape}, must have shapes (d,) and "
            "(d, d) and finite values."
        )
    allowed = COVARIANCE_ROUNDING * abs(np.trace(sigma))
    if np.abs(sigma - sigma.T).max() > allowed:
        raise UserError(f"{covariance} of {path} is no covariance: it is not symmetric.")
    values = np.linalg.eigvalsh(sigma)
    negative = -values[values < 0].sum()
    if negative > allowed:
        raise UserError(
            f"{covariance} of {path} is no covariance: its negative eigenvalues add up to {-negative:.3g}, beside a "
            f"trace of {np.trace(sigma):.3g}."
        )
    return mu, sigma


def save_reference_statistics(path: Path, statistics: FeatureStatistics, metadata: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        np.savez(file, mu=statistics.mu(), sigma=statistics.sigma(), metadata=np.array(json.dumps(metadata)))
