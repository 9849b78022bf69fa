"""Modules whose weights come from elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_RANDOM = (torch.Tensor.normal_, torch.Tensor.uniform_)


class _NoInitialisation(TorchFunctionMode):
    """Leaves out the first values of parameters; for them, on shapes alone, torch would load its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made here have parameters of the meta device: shapes without memory or values.

    Give them values by ``load_state_dict(..., assign=True)``, or memory by ``to_empty``.
    """
    with torch.device("meta"), _NoInitialisation():
        yield
