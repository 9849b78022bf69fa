"""The optimizer of the published recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def build_adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, betas (0.9, 0.95), weight decay on parameters with at least two dimensions (so not on biases and norms).

    The learning rate is set per iteration by the caller. Fused kernels on a GPU.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load moments and step counts; settings such as the weight decay stay those of `optimizer`."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
