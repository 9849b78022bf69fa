"""What `torch.compile` makes of the code, without generating any: no C++ compiler and no Triton is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

import models.loss
import models.mask


@contextlib.contextmanager
def captured_graphs(backend: str = "eager") -> Iterator[Callable[[], int]]:
    """What is compiled in the block is captured and run as it stands; code that does not make one whole graph raises.

    Options, which are the code generator's, are left out. The function that is given tells the number of graphs so far.

    Args:
        backend: "aot_eager" splits graphs into forward and backward as well.
    """
    compile_ = torch.compile
    kept = models.loss._fused_loss_and_gradient, models.mask._fused_flex_attention

    def forget() -> None:
        torch._dynamo.reset()
        counters.clear()
        for function in kept:
            function.cache_clear()

    def captured(function: Callable[..., Any], dynamic: bool | None = None, **ignored: Any) -> Callable[..., Any]:
        return compile_(function, dynamic=dynamic, fullgraph=True, backend=backend)

    forget()
    with patch.object(torch, "compile", captured):
        yield lambda: counters["stats"]["unique_graphs"]
    forget()
