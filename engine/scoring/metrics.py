"""Scores of generated images from their features: Fréchet distance, Inception Score, precision and recall.

A new score is a function here, and a key in what :func:`score` or :func:`adm_scores` returns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.scoring.features import INCEPTION, FeatureExtractor
from engine.scoring.statistics import COVARIANCE_ROUNDING, Array, FeatureStatistics, ReferenceStatistics
from util.errors import UserError

logger = logging.getLogger(__name__)

ISC_SPLITS = 10
NEIGHBOURS = 3  # of precision and recall
_PRECISION_RECALL = "distances in float32; the ADM suite rounds them to float16 and is 0.2 to 0.8 points higher"
CONVENTIONS = {  # of figures that other programs compute otherwise, by their keys in results.json
    "inception_score": f"{ISC_SPLITS} splits, shuffled with a fixed seed; the ADM suite: 5,000 a split, in file order",
    "precision": _PRECISION_RECALL,
    "recall": _PRECISION_RECALL,
}


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Fréchet distance of two Gaussians, |μ₁−μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), in float64 (Heusel et al., 2017).

    With Σ = AAᵀ from an eigendecomposition, tr (Σ₁Σ₂)^½ is the sum of the singular values of A₁ᵀA₂. Neither an inverse
    nor a root of a non-symmetric matrix is taken, so singular covariances of few images do no harm.
    """
    factor1, factor2 = _factor(sigma1), _factor(sigma2)
    trace_root = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    difference = np.asarray(mu1, np.float64) - np.asarray(mu2, np.float64)
    traces = np.trace(sigma1) + np.trace(sigma2)
    distance = float(difference @ difference + traces - 2 * trace_root)
    if distance < -COVARIANCE_ROUNDING * abs(traces):
        raise UserError(f"the Fréchet distance is {distance:.5g}; only matrices that are no covariances give that.")
    return max(distance, 0.0)


def _factor(sigma: Array) -> Array:
    """A with AAᵀ = sigma (d, d), without the directions that are zero up to rounding."""
    values, vectors = np.linalg.eigh(np.asarray(sigma, np.float64))
    kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the Inception Score over 10 shuffled splits of logits (N, K), N ≥ 10.

    Salimans et al. (2016), as torch-fidelity computes it, its shuffling included, but without needing it: a
    classifier's scores must not depend on a package that is there for Inception.
    """
    N = len(logits)
    shuffled = logits[np.random.RandomState(2020).permutation(N)].double()
    scores = []
    for i in range(ISC_SPLITS):
        log_p = shuffled[i * N // ISC_SPLITS : (i + 1) * N // ISC_SPLITS].log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # finite where probabilities underflow
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall of features (N, d) and (M, d), N and M > 3, by the 3rd nearest neighbour.

    Kynkäänniemi et al. (2019), by torch-fidelity, with distances in float32. The ADM suite has the same neighbours but
    rounds distances to float16.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    # Distances come from inner products, which cancel where the mean is large beside the spread.
    mean = real.mean(0, dtype=torch.float64)
    centred, centred_real = ((features - mean).float() for features in (generated, real))
    return calculate_precision_recall_part(centred, centred_real, neighborhood=NEIGHBOURS)


def score(
    statistics: FeatureStatistics, logits: Tensor, reference: ReferenceStatistics | None, extractor_name: str
) -> dict[str, Any]:
    """All figures that features (as statistics) and logits (N, K) give; keys are those of ``results.json``.

    ``warnings`` lists why a figure means little. A figure that can't be computed is left out.
    """
    result: dict[str, Any] = {"warnings": []}
    count, dim = statistics.count, len(statistics.mu())
    if reference is not None and count > 1:
        distance = frechet_distance(statistics.mu(), statistics.sigma(), reference.mu, reference.sigma)
        result["frechet_distance"] = distance
        if extractor_name == INCEPTION:
            result["fid"] = distance
        if count <= dim:
            warning = (
                f"{count} images can't determine the covariance of {dim} features: the Fréchet distance is far too "
                "large and only comparable with others from as many images."
            )
            logger.warning(warning)
            result["warnings"].append(warning)
    if len(logits) >= ISC_SPLITS:
        result["inception_score"], result["inception_score_std"] = inception_score(logits)
    return result


def conventions(scores: Mapping[str, Any]) -> dict[str, str]:
    """How those of ``scores`` are computed that other programs compute otherwise."""
    return {name: text for name, text in CONVENTIONS.items() if name in scores}


def adm_scores(
    spatial: FeatureStatistics,
    features: Tensor,
    reference: ReferenceStatistics,
    extractor: FeatureExtractor,
    batch_size: int,
) -> dict[str, float]:
    """sFID, precision and recall of features (N, d) of generated images, the figures that the ADM suite adds to FID.

    Dhariwal & Nichol (2021); precision and recall differ by the suite's rounding, see :func:`precision_recall`.
    ``reference`` has passed :meth:`ReferenceStatistics.check_adm_suite`; its images go through ``extractor`` first.
    """
    assert reference.spatial is not None
    sfid = frechet_distance(spatial.mu(), spatial.sigma(), *reference.spatial)
    batches = reference.load_samples().split(batch_size)
    real = torch.cat([extractor(images)[0] for images in tqdm(batches, desc="features of the reference's images")])
    precision, recall = precision_recall(features.to(real.device), real)
    return {"sfid": sfid, "precision": precision, "recall": recall}
