"""Models for decoding only, over the weights of another: compiled, narrower, or packed for the CPU's matrix kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import nn

from models.block import Block
from models.kv_cache import KVCache
from models.lpd import LPD, LPDConfig
from util.errors import UserError
from util.shapes import shapes_only

Apply = Callable[[torch.Tensor], torch.Tensor]
_ROWS = 64  # rows that oneDNN is told to expect; any number works


class PackedLinear(nn.Module):
    """Linear layer whose weight is stored once in the layout of a CPU kernel.

    `torch.nn.functional.linear` rearranges the weight at every call, which for the few rows of a decoding step costs as
    much as the product.
    """

    def __init__(self, apply: Apply) -> None:
        super().__init__()
        self.apply_packed = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_packed(x)


def _pack_float32(weight: torch.Tensor, bias: torch.Tensor | None) -> Apply:
    # The operators that torch.compile uses for frozen weights on a CPU (oneDNN).
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _pack_bfloat16(weight: torch.Tensor, bias: torch.Tensor | None) -> Apply:
    apply = _pack_float32(weight.to(torch.bfloat16), None if bias is None else bias.to(torch.bfloat16))
    return lambda x: apply(x.to(torch.bfloat16))


def _pack_float16(weight: torch.Tensor, bias: torch.Tensor | None) -> Apply:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _pack_int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Apply:
    scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    # Without VNNI sums of two products overflow 16 bits, unless activations have 7 bits only.
    reduce_range = not _cpu_has("avx512_vnni")
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=reduce_range)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def _cpu_has(instructions: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(instructions, False))


class Packing(NamedTuple):
    """How linear weights are stored and multiplied on a CPU."""

    pack: Callable[[torch.Tensor, torch.Tensor | None], Apply]
    available: Callable[[], bool]
    needs: str


# By weight storage. Arithmetic is float32 with float16 too; int8 quantises activations as well, at every call.
CPU_PACKINGS = {
    "float32": Packing(_pack_float32, _has_onednn, "torch with oneDNN"),
    "bfloat16": Packing(
        _pack_bfloat16,
        # oneDNN emulates it elsewhere, slower than float32. Processors with AMX have these instructions too.
        lambda: _has_onednn() and _cpu_has("avx512_bf16"),
        "a processor with bfloat16 instructions (AVX-512 BF16 or AMX)",
    ),
    "float16": Packing(_pack_float16, _has_fbgemm, "torch with FBGEMM"),
    "int8": Packing(_pack_int8, _has_fbgemm, "torch with FBGEMM"),
}


class PackedLPD(LPD):
    """A model whose linear layers are packed, its head always so that logits are float32."""

    def predict(self, queries_BND: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(queries_BND))


class CompiledLPD(LPD):
    """A model whose decoding step is compiled but for the attention, once for all layers and numbers of rows.

    What follows the attention of a layer and what precedes that of the next are one function, so that the sum at the
    end of a block and the norm at the start of the next become one kernel.
    """

    def __init__(self, config: LPDConfig) -> None:
        super().__init__(config)
        self._first = torch.compile(Block.before_attention)
        self._between = torch.compile(_between)
        self._last = torch.compile(_last)
        self._embed_step = torch.compile(LPD.embed_step)

    def embed_step(
        self, codes_BN: torch.Tensor, known_BN: torch.Tensor, targets_BQ: torch.Tensor, guided: bool
    ) -> torch.Tensor:
        rows_GND: torch.Tensor = self._embed_step(self, codes_BN, known_BN, targets_BQ, guided)
        return rows_GND

    def decode_step(self, rows_BND: torch.Tensor, num_context: int, cache: KVCache) -> torch.Tensor:
        blocks = [cast(Block, block) for block in self.blocks]
        query, key_value = self._first(blocks[0], rows_BND)
        for layer, (block, following) in enumerate(pairwise(blocks)):
            attended = self.attend(cache, layer, num_context, query, key_value)
            rows_BND, query, key_value = self._between(block, following, rows_BND, attended)
        attended = self.attend(cache, len(blocks) - 1, num_context, query, key_value)
        features_BQD = self._last(blocks[-1], self.norm, rows_BND, attended)
        cache.commit(num_context)
        return self.logits(features_BQD)

    def attend(
        self, cache: KVCache, layer: int, num_context: int, query: torch.Tensor, key_value: torch.Tensor
    ) -> torch.Tensor:
        return cache.attend(layer, num_context, query, key_value)


def _between(
    block: Block, following: Block, rows_BND: torch.Tensor, attended_BHNK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows_BND = block.after_attention(rows_BND, attended_BHNK)
    return rows_BND, *following.before_attention(rows_BND)


def _last(block: Block, norm: nn.LayerNorm, rows_BND: torch.Tensor, attended_BHQK: torch.Tensor) -> torch.Tensor:
    features_BQD = norm(block.after_attention(rows_BND, attended_BHQK))
    device = features_BQD.device.type
    return features_BQD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else features_BQD


def share_weights(model: LPD, kind: type[LPD] = LPD) -> LPD:
    """A second model, of this class, in eval mode and without gradients, over the same parameter tensors."""
    with shapes_only():
        twin = kind(model.config).requires_grad_(False)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def packed_copy(model: LPD, weights: str) -> LPD:
    """A twin of a float32 model on the CPU whose linear layers are packed; :func:`check_can_pack` first.

    Args:
        weights: "float32" (same numbers up to rounding), "bfloat16" (to be run under autocast, which it follows but for
            the head, which stays float32), "float16" (weights rounded to it, float32 arithmetic) or "int8" (one scale
            per output, activations too: visibly less exact).
    """
    twin = share_weights(model, PackedLPD)
    for name, linear in list(twin.named_modules()):
        if isinstance(linear, nn.Linear):
            storage = "float32" if weights == "bfloat16" and linear is twin.head else weights
            bias = None if linear.bias is None else linear.bias.detach()
            twin.set_submodule(name, PackedLinear(CPU_PACKINGS[storage].pack(linear.weight.detach(), bias)))
    return twin


def check_can_pack(weights: str) -> None:
    """Raise UserError where torch or the processor lacks what :func:`packed_copy` needs for `weights`."""
    if not can_pack(weights):
        raise UserError(f"{weights} weights cannot be packed here: that needs {CPU_PACKINGS[weights].needs}.")


def can_pack(weights: str) -> bool:
    """Whether torch and the processor have the kernels of :func:`packed_copy` for `weights`."""
    return CPU_PACKINGS[weights].available()


def narrow_copy(model: LPD, dtype: torch.dtype = torch.bfloat16, kind: type[LPD] = LPD) -> LPD:
    """A twin whose linear weights are cast once to `dtype`, to be run under autocast to it, with the same results.

    Autocast would cast them at every step: it keeps casts of weights that need gradients only, and in inference mode
    none do. Norms, embeddings and the residual stream stay float32, as autocast has them.
    """
    twin = share_weights(model, kind)
    for module in twin.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype != torch.float64:  # which autocast leaves alone
            module.to(dtype)
    return twin
