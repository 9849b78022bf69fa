"""Cross-entropy of a linear head without ever holding all logits.

Shape legend: `N` rows, `D` width, `V` codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

CHUNK_ELEMENTS = 2**26  # logits in memory at a time: 4096 rows of 16384 codes


def _loss_and_gradient(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the rows' cross-entropies, and its gradient: softmax minus one-hot, in the dtype of the logits."""
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    normalizer = wide.logsumexp(dim=1, keepdim=True)
    loss = (normalizer - wide.gather(1, targets_N[:, None])).sum()
    is_target = torch.arange(wide.shape[1], device=wide.device) == targets_N[:, None]
    return loss, ((wide - normalizer).exp() - is_target.to(wide.dtype)).to(logits_NV.dtype)


@cache
def _fused_loss_and_gradient() -> Any:
    return torch.compile(_loss_and_gradient, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made together with the loss, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
        chunk_elements: int,
        loss_and_gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        with torch.autocast(features_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            features_grad, weight_grad = torch.empty_like(features_ND), torch.zeros_like(weight_VD)
            loss = torch.zeros((), device=weight.device, dtype=torch.promote_types(dtype, torch.float32))
            rows = max(1, chunk_elements // len(weight))
            for x, x_grad, targets in zip(
                features_ND.split(rows), features_grad.split(rows), targets_N.split(rows), strict=True
            ):
                x = x.to(dtype)
                chunk_loss, grad_NV = loss_and_gradient(x @ weight.T, targets)
                loss += chunk_loss
                x_grad.copy_(grad_NV @ weight)
                weight_grad += grad_NV.T @ x
        ctx.save_for_backward(features_grad, weight_grad)
        ctx.num_rows = len(features_ND)
        return loss / len(features_ND)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.num_rows
        return features_grad * scale, weight_grad * scale, None, None, None, None


def linear_cross_entropy(
    features_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
    fused: bool = False,
) -> torch.Tensor:
    """Mean cross-entropy of the logits `features @ weight.T`, equal to `F.cross_entropy(F.linear(…).float(), …)`.

    Under autocast the products are computed in its dtype; softmax, loss and the sum of the weight's gradient in float32
    (or float64, if the weight is).

    Args:
        targets_N: int64.
        chunk_elements: logits that exist at a time.
        fused: compile what happens to the logits of a chunk to one kernel.
    """
    device_type = features_ND.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else weight_VD.dtype
    kernel = _fused_loss_and_gradient() if fused else _loss_and_gradient
    loss: torch.Tensor = _LinearCrossEntropy.apply(features_ND, weight_VD, targets_N, dtype, chunk_elements, kernel)
    return loss
