"""The optimizer of the published recipe and moving averages of weights, for plain and for sharded weights.

FSDP makes every parameter, and all that is computed from it, a DTensor: each process holds one shard. Checkpoints hold
complete plain tensors, so a run can resume with another number of processes, with or without sharding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


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
    """Load complete moments and step counts; hyperparameters such as the weight decay stay those of `optimizer`."""
    hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: sharded_like(parameters[index], value) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})
    for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update(values)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of a sharded one the complete tensor, for which every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A complete `tensor`, the same on every process, on the device of `parameter` and sharded if that is sharded."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


class EMA:
    """Exponential moving average of a model's parameters, in float32 at least: each step decay·average + (1-decay)·new.

    It starts from the present weights. Of sharded weights each process averages its own shard.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self.average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }
        self._decay = decay

    def update(self, decay: float | None = None) -> None:
        """Add the present weights to the average; ``decay`` takes the place of the usual one."""
        averages, parameters = (
            [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
            for tensors in (self.average, self._parameters)
        )
        get_ema_multi_avg_fn(self._decay if decay is None else decay)(averages, parameters, 0)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Resume from a complete state dict with the same names."""
        for name, average in self.average.items():
            average.copy_(sharded_like(average, state[name]))
