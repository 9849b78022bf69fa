"""The likelihood of images under an order and group sizes: one pass of the training kind.

The tokens of a group are drawn at once, independently of each other, given the class and all groups before. So

    log p(image | order, groups) = Σ over groups, over the tokens of the group, log p(token | class, earlier groups)

which is what the queries of the masked training pass predict.

Shape legend: `B` images, `L` tokens of an image, `D` width, `V` codes, `N` rows, `S` steps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch

from models.loss import CHUNK_ELEMENTS
from models.lpd import LPD
from orders.baselines import FIXED_KINDS
from orders.draw import LPD_KINDS, Orders


@torch.inference_mode()
def token_bits(
    model: LPD,
    tokens_BL: torch.Tensor,
    labels_B: torch.Tensor | None,
    orders_BL: torch.Tensor,
    group_sizes: Sequence[int],
    attention: str = "sdpa",
    chunk_elements: int = CHUNK_ELEMENTS,
) -> torch.Tensor:
    """−log₂ p of every token, float64 (B, L) in generation order; a row's sum is the image's, in bits.

    Args:
        model: in eval mode; autocast is honoured.
        tokens_BL: int64 codes in raster order.
        labels_B: int64 classes, or None: without class.
        orders_BL: int64, each row a permutation of raster indices.
        group_sizes: tokens per step, summing to L.
        attention: "sdpa" or "flex", see :func:`models.mask.training_attention`.
        chunk_elements: logits in memory at a time.

    Raises:
        UserError: where shapes or group sizes do not fit the model.
    """
    features_ND = model.features(tokens_BL, labels_B, orders_BL, group_sizes, attention=attention).flatten(0, 1)
    targets_N = tokens_BL.gather(1, orders_BL).flatten()
    rows, bits = max(1, chunk_elements // model.config.vocab_size), []
    for features, targets in zip(features_ND.split(rows), targets_N.split(rows), strict=True):
        logits_NV = model.logits(features[None])[0]
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        bits.append((logits_NV.logsumexp(dim=1) - logits_NV.gather(1, targets[:, None])[:, 0]).double() / math.log(2))
    return torch.cat(bits).view_as(tokens_BL)


@dataclass(frozen=True)
class Decoding:
    """How images are decoded: in which orders, by which groups, with the class or without."""

    orders: Orders
    group_sizes: tuple[int, ...]
    with_class: bool = True

    @property
    def varies(self) -> bool:
        """Whether images have different orders."""
        return self.orders.rows is not None or self.orders.spec.kind not in FIXED_KINDS

    @cached_property
    def order_key(self) -> str:
        """Equal for the same orders of the same images; only the locality-aware ones depend on the group sizes."""
        spec, rows = self.orders.spec, self.orders.rows
        if rows is not None:
            return hashlib.sha256(rows.tobytes()).hexdigest()
        decisive = asdict(spec) if spec.kind in LPD_KINDS else [spec.kind, spec.grid, spec.seed]
        return json.dumps(decisive)

    @cached_property
    def key(self) -> str:
        """Equal for the same likelihood of the same images."""
        return json.dumps([self.order_key, self.group_sizes, self.with_class])

    def one_by_one(self) -> Decoding:
        """The same orders, a token per step."""
        return replace(self, group_sizes=(1,) * sum(self.group_sizes))


@dataclass
class Sums:
    """What is kept of the likelihoods of some images, each averaged over its orders; all in bits, float64."""

    images: np.ndarray  # (B,), in the order in which they were added
    steps: np.ndarray  # (2, S): sums over the images of the bits of each step, and of their squares
    positions: np.ndarray  # (L,): sums over the images of the bits at each raster index

    @staticmethod
    def of(bits_KBL: torch.Tensor, orders_KBL: torch.Tensor, group_sizes: Sequence[int]) -> Sums:
        """Of the bits (K, B, L) of B images in K orders each."""
        K, _, L = bits_KBL.shape
        ends = torch.tensor(group_sizes, device=bits_KBL.device).cumsum(0) - 1
        upto_BS = bits_KBL.mean(0).cumsum(-1)[:, ends]
        steps_BS = upto_BS.diff(dim=1, prepend=upto_BS.new_zeros(len(upto_BS), 1))
        positions = bits_KBL.new_zeros(L).index_add_(0, orders_KBL.flatten(), bits_KBL.flatten()) / K
        steps = torch.stack([steps_BS.sum(0), steps_BS.square().sum(0)])
        return Sums(upto_BS[:, -1].cpu().numpy(), steps.cpu().numpy(), positions.cpu().numpy())
