"""Whether a model's parameters are still those that copies were made of."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Weights:
    """The parameters of a module as they are now.

    A change in place is seen by the version that torch counts, a replaced parameter by its identity. Not seen is what
    torch does not count: writes through `.data`, and into tensors made in inference mode.
    """

    def __init__(self, module: nn.Module) -> None:
        _count_optimizer_steps()
        slots = [
            (owner._parameters, name, parameter, None if parameter.is_inference() else parameter._version)
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None
        ]
        self._slots = slots
        # A module that is dropped is freed, though copies of its parameters live on.
        self._module = weakref.ref(module, lambda _: slots.clear())

    def changed(self) -> bool:
        """Whether one was changed or replaced since (tens of microseconds for 300 parameters)."""
        return any(
            owner.get(name) is not parameter or (version is not None and parameter._version != version)
            for owner, name, parameter, version in self._slots
        )


@functools.cache
def _count_optimizer_steps() -> None:
    """From now on an optimizer's step counts as a change: fused ones write without counting (torch 2.11)."""

    def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        increment_version(stepped)

    register_optimizer_step_post_hook(count)
