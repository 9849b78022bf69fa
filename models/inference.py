"""Copies of a model for decoding only: linear weights in another precision, or packed for the CPU's matrix kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from models.lpd import LPD
from util.errors import UserError


class PackedLinear(nn.Module):
    """Linear layer whose weight is stored once in the layout of a CPU kernel.

    `torch.nn.functional.linear` rearranges the weight at every call, which for the few rows of a decoding step costs as
    much as the product.
    """

    def __init__(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.apply_packed = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_packed(x)


_ROWS = 64  # rows that oneDNN is told to expect; any number works


def _pack_float32(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    # The operators that torch.compile uses for frozen weights on a CPU (oneDNN).
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return PackedLinear(lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


def _pack_float16(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return PackedLinear(lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed))


def _pack_int8(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    # reduce_range: without it AVX2 sums of two products overflow 16 bits.
    return PackedLinear(lambda x: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True))


# Weight storage → packing; arithmetic is float32 but for int8, which quantises activations per call as well.
CPU_PACKINGS = {"float32": _pack_float32, "float16": _pack_float16, "int8": _pack_int8}


def share_weights(model: LPD) -> LPD:
    """A second model in eval mode over the same parameter tensors."""
    with torch.device("meta"):
        twin = LPD(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def packed_copy(model: LPD, weights: str) -> LPD:
    """A twin of a float32 model on the CPU whose linear layers are packed.

    Args:
        weights: "float32" (same numbers up to rounding), "float16" (weights rounded to it, float32 arithmetic) or
            "int8" (one scale per output, activations too: visibly less exact).

    Raises:
        UserError: where this build of torch has no such kernels.
    """
    if not can_pack(weights):
        raise UserError(f"this build of torch has no kernels for packed {weights} weights on this CPU.")
    twin, pack = share_weights(model), CPU_PACKINGS[weights]
    linears = [
        (parent, name, child)
        for parent in twin.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    with torch.no_grad():
        for parent, name, linear in linears:
            setattr(parent, name, pack(linear.weight.detach(), None if linear.bias is None else linear.bias.detach()))
    return twin


def can_pack(weights: str) -> bool:
    """Whether this build of torch has the kernels of :func:`packed_copy` for `weights`."""
    if weights == "float32":
        return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return "fbgemm" in torch.backends.quantized.supported_engines


def bf16_copy(model: LPD) -> LPD:
    """A twin whose linear weights are bfloat16, to be run under autocast.

    Norms, embeddings and the residual stream stay float32, as autocast has them; it casts the weights at every call.
    """
    twin = share_weights(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return twin
