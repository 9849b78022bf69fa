"""Tensors on "cuda" without a GPU: they have devices, dtypes and shapes, but no values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Everything made in the block is fake; the device "cuda" can be named, and autocast believes in it;
    streams and events do nothing.

    A value that is read raises `DataDependentOutputException`, devices that are mixed a RuntimeError. The backward pass
    is not to be had: autograd's engine wants a real device.
    """
    with (
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda *arguments, **options: True),
        patch.object(torch.cuda, "device", contextlib.nullcontext),
        patch.object(torch.cuda, "Event"),
        patch.object(torch.cuda, "current_stream"),
        patch.object(torch.nn.Module, "_apply", _apply),
        FakeTensorMode(),
    ):
        yield


def _apply(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """What `Module.to` does, with new parameters: torch's own swaps their contents, which fake ones don't allow."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(function(parameter.detach()), parameter.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, function(buffer))
    return module


class NoCopiesBetweenDevices(TorchDispatchMode):
    """Refuses what goes from the host to a device or back: from pageable memory it would wait, and spoil a capture."""

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if "copy" in function.name():
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            devices = {tensor.device.type for tensor in tensors}
            assert len(devices) < 2, f"{function} copies between {devices}"
        return result
