"""Keeping a codebook alive while it is trained: a start by k-means, revival of dead entries, and measures of use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers.vq_model import Codebook

_KMEANS_FEATURES = 2**17
_DEAD_SHARE = 0.02  # an entry is dead when used less than this share of the average


@torch.no_grad()
def kmeans_start(codebook: Codebook, features: Tensor, iterations: int = 10) -> None:
    """Set the entries to the spherical k-means centres of unit vectors ``features`` (N, K), N ≥ 1, in place.

    A random part of very many features is used. Centres that attract nothing move to random features.
    """
    features = _sample(features, min(len(features), _KMEANS_FEATURES))
    size = codebook.embedding.num_embeddings
    weight = codebook.embedding.weight
    weight.copy_(_sample(features, size))
    for _ in range(iterations):
        nearest = codebook.nearest(features)
        sums = torch.zeros_like(weight).index_add_(0, nearest, features)
        empty = torch.bincount(nearest, minlength=size) == 0
        sums[empty] = _sample(features, int(empty.sum()))
        weight.copy_(F.normalize(sums, dim=-1))


class DeadCodeRevival:
    """Counts how often each entry is chosen and moves the dead ones onto encoder outputs that are badly served.

    After Dhariwal et al., "Jukebox" (arXiv:2005.00341, section 3.1), which restarts them on random encoder outputs.
    """

    def __init__(self, codebook: Codebook) -> None:
        self._codebook = codebook
        self.counts = torch.zeros(codebook.embedding.num_embeddings, device=codebook.embedding.weight.device)

    def count(self, indices: Tensor) -> None:
        flat = indices.flatten()
        self.counts.index_add_(0, flat, torch.ones_like(flat, dtype=self.counts.dtype))

    @torch.no_grad()
    def revive(self, features: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """Replace what was dead since the last call by members of ``features`` (N, K); returns which, int64 (n,).

        Features are drawn in proportion to their squared distance to the nearest entry (as in k-means++), and the
        optimizer forgets its moments of the replaced entries.
        """
        dead = (self.counts < _DEAD_SHARE * self.counts.mean()).nonzero().flatten()
        weight = self._codebook.embedding.weight
        distance = (features - self._codebook.lookup(self._codebook.nearest(features))).square().sum(-1)
        dead = dead[: int((distance > 0).sum())]
        if len(dead):
            weight[dead] = features[torch.multinomial(distance, len(dead))].to(weight.dtype)
            for moment in ("exp_avg", "exp_avg_sq"):
                if weight in optimizer.state:
                    optimizer.state[weight][moment][dead] = 0
        self.counts.zero_()
        return dead


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """How often each of the V entries was chosen → (share of entries chosen at all, perplexity in [1, V])."""
    share = counts.double() / counts.sum()
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())


def _sample(features: Tensor, number: int) -> Tensor:
    """``number`` rows drawn at random, without repetition as long as there are enough."""
    order = torch.randperm(len(features), device=features.device)
    return features[order[torch.arange(number, device=features.device) % len(features)]]
