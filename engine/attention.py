"""How far attention reaches: its weight by the distance between a query and what it sees, per layer and head.

The measure is the paper's (arXiv 2507.01957, section 3.3), attention per token: for each query the mean weight of the
tokens at a distance, then the mean over the queries that see any there. Only query rows are measured, whose outputs
predict codes. Distances are Euclidean, in cells of the token grid, rounded.

Shape legend: `B` images, `Q` queries, `N` keys, `H` heads, `K` head_dim, `L` tokens of an image, `S` bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from engine.decoding.loop import decode
from models.block import Attend
from models.inference import share_weights
from models.kv_cache import KVCache
from models.lpd import LPD
from models.mask import training_mask
from models.sampling import Sampling

# layer, query (B, H, Q, K), key (B, H, N, K), raster indices of the queries (B, Q) and keys (B, N) with -1 for the
# class token, number of keys that are context, whom each query sees (Q, N).
Measure = Callable[[int, Tensor, Tensor, Tensor, Tensor, int, Tensor | None], None]


class AttentionByDistance:
    """Sums over all queries measured so far.

    Every key falls into one of S bins: context tokens by distance, tokens asked for at the same step (queries) by
    distance, 0 being the query itself, and the class token.
    """

    def __init__(self, depth: int, heads: int, grid_size: int) -> None:
        self.grid_size = grid_size
        self.reach = 1 + round(math.hypot(grid_size - 1, grid_size - 1))  # distances 0 … reach − 1
        bins = 2 * self.reach + 1
        self._mass = torch.zeros(depth, heads, bins, dtype=torch.float64)
        self._per_token = torch.zeros(depth, heads, bins, dtype=torch.float64)
        self._even = torch.zeros(bins, dtype=torch.float64)
        self._queries = torch.zeros(bins, dtype=torch.float64)  # that see a key in the bin, over all layers
        self._depth = depth
        self._measured = 0  # queries, over all layers

    def _bins(self, query_BQ: Tensor, key_BN: Tensor, num_context: int) -> Tensor:
        """The bin of each pair, int64 (B, Q, N)."""
        side = self.grid_size
        rows = query_BQ[:, :, None] // side - key_BN[:, None] // side
        columns = query_BQ[:, :, None] % side - key_BN[:, None] % side
        bins = torch.hypot(rows.double(), columns.double()).round().long()
        bins[:, :, num_context:] += self.reach
        return bins.masked_fill(key_BN[:, None] < 0, 2 * self.reach)

    def add(
        self,
        layer: int,
        query_BHQK: Tensor,
        key_BHNK: Tensor,
        query_BQ: Tensor,
        key_BN: Tensor,
        num_context: int,
        visible_QN: Tensor | None = None,
    ) -> None:
        """Measure the attention of one layer, see :data:`Measure`."""
        scores = query_BHQK.double() @ key_BHNK.double().transpose(2, 3) / math.sqrt(query_BHQK.shape[3])
        if visible_QN is None:
            visible_QN = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
        weights_BHQN = scores.masked_fill(~visible_QN, -torch.inf).softmax(dim=-1)
        bins = self._bins(query_BQ, key_BN, num_context)
        seen = visible_QN.expand_as(bins).double()
        count = seen.new_zeros(*bins.shape[:2], len(self._even)).scatter_add_(2, bins, seen)
        mass = weights_BHQN.new_zeros(*weights_BHQN.shape[:3], len(self._even))
        mass.scatter_add_(3, bins[:, None].expand_as(weights_BHQN), weights_BHQN)
        any_there = (count > 0).double()
        self._mass[layer] += mass.sum(dim=(0, 2)).cpu()
        self._per_token[layer] += (mass / count.clamp(min=1)[:, None]).sum(dim=(0, 2)).cpu()
        self._even += (any_there / seen.sum(dim=2, keepdim=True)).sum(dim=(0, 1)).cpu()
        self._queries += any_there.sum(dim=(0, 1)).cpu()
        self._measured += query_BQ.numel()

    def figures(self) -> dict[str, Any]:
        """Plain data; lists over layers of lists over heads (of lists over `distances`).

        `context` and `same_step` have for each of their `distances` the attention `per_token`, and what it would be if
        each query spread its attention `even`ly over all that it sees. `shares` says what part of a query's attention
        goes where; the parts sum to 1.
        """
        queries = self._measured / self._depth
        per_token, even = self._per_token / (self._queries / self._depth), self._even / self._queries
        shares, reach = self._mass / queries, self.reach
        figures: dict[str, Any] = {"num_queries": round(queries)}
        for name, first in (("context", 0), ("same_step", reach)):
            there = [d for d in range(1, reach) if self._queries[first + d] > 0]
            columns = [first + d for d in there]
            figures[name] = {
                "distances": there,
                "per_token": per_token[:, :, columns].tolist(),
                "even": even[columns].tolist(),
            }
        figures["shares"] = {
            "class_token": shares[:, :, 2 * reach].tolist(),
            "context": shares[:, :, :reach].sum(dim=2).tolist(),
            "same_step": shares[:, :, reach + 1 : 2 * reach].sum(dim=2).tolist(),
            "itself": shares[:, :, reach].tolist(),
        }
        return figures


class _MeasuredCache(KVCache):
    """A cache that measures the attention of the queries of the first images that pass through it."""

    def __init__(self, model: LPD, orders_BL: Tensor, rows: int, measure: Measure) -> None:
        config, weight = model.config, model.pos_embed
        head_dim = config.embed_dim // config.num_heads
        capacity = 1 + config.num_tokens
        super().__init__(config.depth, rows, config.num_heads, capacity, head_dim, weight.device, weight.dtype)
        self._class_and_orders = torch.cat([orders_BL.new_full((len(orders_BL), 1), -1), orders_BL], dim=1)
        self._measure = measure

    def attend(self, layer: int, num_context: int, query_BHNK: Tensor, key_value_2BHNK: Tensor) -> Tensor:
        attended = super().attend(layer, num_context, query_BHNK, key_value_2BHNK)
        images, stop = len(self._class_and_orders), self.length + query_BHNK.shape[2]
        seen = self.length + num_context
        positions = self._class_and_orders[:, :stop]
        keys = self.key_values[layer, 0, :images, :, :stop]
        self._measure(layer, query_BHNK[:images, :, num_context:], keys, positions[:, seen:], positions, seen, None)
        return attended


@torch.inference_mode()
def while_decoding(
    model: LPD,
    labels_B: Tensor,
    orders_BL: Tensor,
    seeds_B: Tensor,
    group_sizes: Sequence[int],
    sampling: Sampling,
    measured: AttentionByDistance,
) -> None:
    """Decode images and measure on the way; with guidance the half of the batch that has its class."""
    rows = len(orders_BL) * (2 if sampling.guided else 1)
    cache = _MeasuredCache(model, orders_BL, rows, measured.add)
    decode(model, labels_B, orders_BL, seeds_B, group_sizes, sampling, cache)


class _MeasuredLPD(LPD):
    """A model that measures the attention of the queries of its training pass."""

    measure: Callable[[int, Tensor, Tensor], None]

    def transform(self, rows_BND: Tensor, attend: Attend, attend_last: Attend) -> Tensor:
        for layer, block in enumerate(self.blocks):
            attend_now = attend_last if block is self.blocks[-1] else attend
            rows_BND = block(rows_BND, partial(self._attend, layer, attend_now))
        return rows_BND

    def _attend(self, layer: int, attend: Attend, query: Tensor, key_value: Tensor) -> Tensor:
        self.measure(layer, query, key_value[0])
        return attend(query, key_value)


@torch.inference_mode()
def in_training_pass(
    model: LPD,
    codes_BL: Tensor,
    labels_B: Tensor,
    orders_BL: Tensor,
    group_sizes: Sequence[int],
    measured: AttentionByDistance,
) -> None:
    """Run the training pass over images' codes, without dropout, and measure."""
    L = orders_BL.shape[1]
    context = torch.cat([orders_BL.new_full((len(orders_BL), 1), -1), orders_BL[:, :-1]], dim=1)
    visible_LR = training_mask(group_sizes, orders_BL.device)[L:]

    def measure(layer: int, query: Tensor, key: Tensor) -> None:
        positions = torch.cat([context, orders_BL], dim=1)
        measured.add(layer, query[:, :, L:], key, orders_BL, positions, L, visible_LR)

    twin = cast(_MeasuredLPD, share_weights(model, _MeasuredLPD))
    twin.measure = measure
    twin.features(codes_BL, labels_B, orders_BL, group_sizes)
