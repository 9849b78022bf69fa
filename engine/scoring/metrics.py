"""Scores of generated images from their features: Fréchet distance, Inception Score, precision and recall."""

from __future__ import annotations

import json
import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from engine.scoring.features import INCEPTION, SPATIAL_DIM, FeatureExtractor
from tokenizers import VQModel
from util.dist import Dist
from util.errors import UserError
from util.files import atomic_write, sha256
from util.pictures import to_float, to_uint8

logger = logging.getLogger(__name__)


Array = NDArray[np.float64]


ISC_SPLITS = 10


NEIGHBOURS = 3  # of precision and recall


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64 and without keeping them.

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


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Fréchet distance of two Gaussians, |μ₁−μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), in float64 (Heusel et al., 2017).

    With Σ = AAᵀ from an eigendecomposition, tr (Σ₁Σ₂)^½ is the sum of the singular values of A₁ᵀA₂. Neither an inverse
    nor a root of a non-symmetric matrix is taken, so singular covariances of few images do no harm.
    """
    factor1, factor2 = _factor(sigma1), _factor(sigma2)
    trace_root = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    difference = np.asarray(mu1, np.float64) - np.asarray(mu2, np.float64)
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    return max(float(distance), 0.0)


def _factor(sigma: Array) -> Array:
    """A with AAᵀ = sigma (d, d), without the directions that are zero up to rounding."""
    values, vectors = np.linalg.eigh(np.asarray(sigma, np.float64))
    kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the Inception Score over 10 shuffled splits of logits (N, K), N ≥ 10.

    Salimans et al. (2016), as torch-fidelity computes it, its shuffling included.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    scores = isc_features_to_metric(logits, splits=ISC_SPLITS)
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall of features (N, d) and (M, d), N and M > 3, by the 3rd nearest neighbour.

    Kynkäänniemi et al. (2019), as in torch-fidelity and the ADM suite.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    return calculate_precision_recall_part(generated, real, neighborhood=NEIGHBOURS)


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean and covariance of the features of real images, and where they come from."""

    path: Path
    sha256: str
    mu: Array  # (d,) float64
    sigma: Array  # (d, d) float64
    metadata: dict[str, Any]  # of the command below; empty for other people's files, which are Inception's
    spatial: tuple[Array, Array] | None = None  # mean and covariance of spatial features, for sFID
    samples: tuple[int, ...] | None = None  # shape of the real images in the file, uint8 (M, H, W, 3)

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
        if self.metadata.get("img_size", img_size) != img_size:
            raise UserError(
                f"{self.path} holds statistics of {self.metadata['img_size']} px images, the images scored have "
                f"{img_size} px."
            )

    def check_adm_suite(self, img_size: int) -> None:
        """Raise UserError unless the file has what sFID, precision and recall need."""
        has_spatial = self.spatial is not None and len(self.spatial[0]) == SPATIAL_DIM
        if not has_spatial or self.samples is None or self.samples[1:] != (img_size, img_size, 3):
            raise UserError(
                f"--adm_suite needs mu_s and sigma_s of {SPATIAL_DIM} features and images arr_0 of {img_size} px, as "
                f"OpenAI's VIRTUAL_*.npz have them; {self.path} does not."
            )

    def load_samples(self) -> Tensor:
        """The real images of the file as uint8 (M, 3, H, W)."""
        with np.load(self.path) as file:
            return torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)


def load_reference_statistics(path: str | Path) -> ReferenceStatistics:
    """Read an npz with `mu` (d,) and `sigma` (d, d): the ADM suite's, OpenAI's ``VIRTUAL_*.npz``, or one made here.

    Raises:
        UserError: if there is no such file, or it does not hold finite statistics of matching shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"reference statistics {path} do not exist; ImageNet's are adm_in256_stats.npz (512: adm_in512_stats.npz) "
            "or OpenAI's VIRTUAL_imagenet256_labeled.npz, other data's are made by python -m engine.metrics."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            pairs = [("mu", "sigma"), ("mu_s", "sigma_s")] if "mu_s" in file else [("mu", "sigma")]
            statistics = [(file[mu].astype(np.float64), file[sigma].astype(np.float64)) for mu, sigma in pairs]
            metadata = json.loads(str(file["metadata"])) if "metadata" in file else {}
            samples = _stored_shape(path, "arr_0") if "arr_0" in file else None
    except KeyError as error:
        raise UserError(f"{path} holds no array {error}; reference statistics have 'mu' and 'sigma'.") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable npz file of reference statistics ({error}).") from None
    for (mu, sigma), names in zip(statistics, pairs, strict=True):
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(
                f"{' and '.join(names)} of {path} have shapes {mu.shape} and {sigma.shape}; expected (d,) and (d, d)."
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{' or '.join(names)} of {path} has values that are not finite.")
        if not np.allclose(sigma, sigma.T, atol=1e-6 * np.abs(sigma).max()):
            raise UserError(f"{names[1]} of {path} is not symmetric, so it is no covariance.")
    spatial = statistics[1] if len(statistics) > 1 else None
    return ReferenceStatistics(path, sha256(path), *statistics[0], metadata, spatial, samples)


def _stored_shape(path: Path, name: str) -> tuple[int, ...]:
    """Shape of an array of an npz file, without reading the array."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return read[np.lib.format.read_magic(member)](member)[0]


def save_reference_statistics(path: Path, statistics: FeatureStatistics, metadata: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        np.savez(file, mu=statistics.mu(), sigma=statistics.sigma(), metadata=np.array(json.dumps(metadata)))


def few_images_warning(count: int, dim: int) -> str | None:
    """Why a distance from this many images means little, or None."""
    if count > dim:
        return None
    return (
        f"{count} images can't determine the covariance of {dim} features: the Fréchet distance is far too large and "
        "only comparable with others from as many images."
    )


def score(
    statistics: FeatureStatistics, logits: Tensor, reference: ReferenceStatistics | None, extractor_name: str
) -> dict[str, Any]:
    """All figures that features (as statistics) and logits (N, K) give; keys are those of ``results.json``."""
    result: dict[str, Any] = {"warnings": []}
    warning = few_images_warning(statistics.count, len(statistics.mu()))
    if reference is not None and statistics.count > 1:
        distance = frechet_distance(statistics.mu(), statistics.sigma(), reference.mu, reference.sigma)
        result["frechet_distance"] = distance
        if extractor_name == INCEPTION:
            result["fid"] = distance
        if warning:
            logger.warning(warning)
            result["warnings"].append(warning)
    if len(logits) >= ISC_SPLITS:
        result["inception_score"], result["inception_score_std"] = inception_score(logits)
    return result


def adm_scores(
    spatial: FeatureStatistics,
    features: Tensor,
    reference: ReferenceStatistics,
    extractor: FeatureExtractor,
    batch_size: int,
) -> dict[str, float]:
    """sFID, precision and recall of features (N, d) of generated images, as in the ADM suite (Dhariwal & Nichol, 2021).

    ``reference`` has passed :meth:`ReferenceStatistics.check_adm_suite`; its images go through ``extractor`` first.
    """
    assert reference.spatial is not None
    sfid = frechet_distance(spatial.mu(), spatial.sigma(), *reference.spatial)
    batches = reference.load_samples().split(batch_size)
    real = torch.cat([extractor(images)[0] for images in tqdm(batches, desc="features of the reference's images")])
    precision, recall = precision_recall(features.to(real.device), real)
    return {"sfid": sfid, "precision": precision, "recall": recall}


@torch.no_grad()
def reconstruct(tokenizer: VQModel, images: Tensor) -> Tensor:
    """What a tokenizer makes of images: uint8 (B, 3, H, W) → the same, on the tokenizer's device."""
    device = next(tokenizer.parameters()).device
    x = to_float(images.permute(0, 2, 3, 1).to(device))
    return to_uint8(tokenizer.decode(tokenizer.encode(x))).permute(0, 3, 1, 2)
