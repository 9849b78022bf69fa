"""Features with known statistics."""

from __future__ import annotations

import numpy as np


def features_of(num: int, dim: int, seed: int) -> np.ndarray:
    """Correlated Gaussian features (num, dim) float64."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num, dim)) @ rng.standard_normal((dim, dim)) + rng.standard_normal(dim)


def statistics_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)
