"""A model for decoding in bfloat16 on a GPU, whose steps of few rows are launches of :mod:`models.decode_kernels`.

Shape legend: `B` images, `G` sequences (2B with guidance), `N` and `Q` context and query rows of a step, `V` codes.
"""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor, nn

from models.block import Block
from models.decode_kernels import ROWS, Linear, StepKernels, attend, keep
from models.inference import CompiledLPD, share_weights
from models.kv_cache import KVCache
from models.lpd import LPD, LPDConfig

MAX_ROWS = 128  # of a step; above, the products are bound by arithmetic, and left to the library


def has_kernels(config: LPDConfig) -> bool:
    """Whether the kernels' tiles divide a model of these sizes."""
    hidden = int(config.embed_dim * config.mlp_ratio)
    sizes_fit = all(size % 64 == 0 for size in (config.embed_dim, hidden, config.vocab_size))
    return sizes_fit and config.embed_dim // config.num_heads in (16, 32, 64, 128)


class FusedLPD(CompiledLPD):
    """Steps of at most `MAX_ROWS` rows by own kernels; longer ones by compiled pieces around the library's products
    and own attention. Made by :func:`fused_copy`."""

    def prepare(self, sequences: int, rows_per_sequence: int, float8: bool = False) -> None:
        """Take the norms' gains into the weights that follow them, cast these, and allocate the buffers.

        Args:
            sequences: G of every step.
            rows_per_sequence: N + Q at most.
            float8: store the weights in float8, and use own kernels for steps of any length, as nothing else can.
        """
        config, rows = self.config, sequences * rows_per_sequence
        hidden = int(config.embed_dim * config.mlp_ratio)
        self._sequences, self._float8 = sequences, float8
        dtype = torch.float8_e4m3fn if float8 else torch.bfloat16
        self._layers = [
            (
                _take_in(block.attn.qkv, block.norm1, dtype),
                _take_in(block.attn.proj, None, dtype),
                _take_in(block.mlp.fc1, block.norm2, dtype),
                _take_in(block.mlp.fc2, None, dtype),
            )
            for block in cast(list[Block], list(self.blocks))
        ]
        self._head = _take_in(self.head, self.norm, dtype)
        max_rows = rows if float8 else min(rows, MAX_ROWS)
        self._kernels = StepKernels(max_rows, config.embed_dim, config.num_heads, hidden, self.pos_embed.device)
        linears = [*itertools.chain(*self._layers), self._head]
        held = itertools.chain(*(vars(holder).values() for holder in (*linears, self._kernels)))
        for i, tensor in enumerate(value for value in held if isinstance(value, Tensor)):
            self.register_buffer(f"_held_{i}", tensor, persistent=False)  # what has to do with memory finds all of it

    def first_step(self, labels_B: Tensor | None, targets_BQ: Tensor, guided: bool, cache: KVCache) -> Tensor:
        if not self._fits(1 + targets_BQ.shape[1]):
            return super().first_step(labels_B, targets_BQ, guided, cache)
        self._kernels.embed(self, self._sequences, 1, labels_B, None, targets_BQ)
        return self._run_layers(1, targets_BQ.shape[1], cache)

    def next_step(self, codes_BN: Tensor, known_BN: Tensor, targets_BQ: Tensor, guided: bool, cache: KVCache) -> Tensor:
        num_context, queries = known_BN.shape[1], targets_BQ.shape[1]
        if not self._fits(num_context + queries):
            return super().next_step(codes_BN, known_BN, targets_BQ, guided, cache)
        self._kernels.embed(self, self._sequences, num_context, codes_BN, known_BN, targets_BQ)
        return self._run_layers(num_context, queries, cache)

    def _fits(self, rows_per_sequence: int) -> bool:
        return self._sequences * rows_per_sequence <= self._kernels.max_rows

    def _run_layers(self, num_context: int, queries: int, cache: KVCache) -> Tensor:
        kernels, G, rows = self._kernels, self._sequences, num_context + queries
        # In the last layer too context rows go along, though nobody reads them: one layer of many.
        for key_values, (qkv, proj, fc1, fc2) in zip(cache.key_values, self._layers, strict=True):
            kernels.project_in(qkv, key_values, cache.length, rows)
            kernels.attend(key_values, cache.length, num_context, rows)
            kernels.add_product(proj, kernels.attended, G * rows)
            kernels.apply(fc1, kernels.hidden_rows, G, rows, rows, gelu=True)
            kernels.add_product(fc2, kernels.hidden_rows, G * rows)
        cache.commit(num_context)
        if G * queries > ROWS.value and not self._float8:  # the largest product: two tiles of rows are too slow
            stream_GRD = kernels.stream[: G * rows].unflatten(0, (G, rows))
            return self.predict(stream_GRD[:, num_context:])
        logits_GQV = torch.empty(G, queries, self.config.vocab_size, device=kernels.stream.device)
        kernels.apply(self._head, logits_GQV, G, rows, queries, gelu=False)
        return logits_GQV

    def attend(self, cache: KVCache, layer: int, num_context: int, query: Tensor, key_value: Tensor) -> Tensor:
        G, H, R, K = query.shape
        kept = cache.key_values[layer]
        keep(key_value, kept, cache.length)
        out_GRHK = torch.empty(G, R, H, K, device=query.device, dtype=query.dtype)
        attend(query, kept, out_GRHK, cache.length, num_context, R)
        attended = out_GRHK.transpose(1, 2)
        return attended[:, :, num_context:] if layer == len(cache.key_values) - 1 else attended


def fused_copy(model: LPD, sequences: int, rows_per_sequence: int, float8: bool = False) -> FusedLPD:
    """A twin of a float32 model on a GPU, to be run under autocast to bfloat16; see :meth:`FusedLPD.prepare`."""
    twin = cast(FusedLPD, share_weights(model, FusedLPD))
    twin.prepare(sequences, rows_per_sequence, float8)
    return twin


def _take_in(linear: nn.Linear, norm: nn.LayerNorm | None, dtype: torch.dtype) -> Linear:
    """A layer for the kernels, with the gains of the norm before it in its weights.

    The modules share the new weights, and the norm loses its gains, so that nothing holds on to the float32 weights.
    The head, which has no bias, keeps its own weights and its norm's gains; but in float8 the modules are not used.
    """
    weight = linear.weight.detach()
    bias = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.detach()
    if norm is not None:
        bias = bias + weight @ norm.bias.detach()
        weight = weight * norm.weight.detach()
    taken = Linear.of(weight, bias, dtype)
    if linear.bias is None and dtype == torch.bfloat16:
        linear.to(dtype)
        return taken
    linear.weight, linear.bias = _frozen(taken.weight), _frozen(bias.bfloat16())
    if norm is not None:
        norm.weight, norm.bias = _frozen(torch.ones_like(norm.weight)), _frozen(torch.zeros_like(norm.bias))
    return taken


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
