"""The key/value cache of parallel decoding, an explicit object handed to the model."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of all layers in two buffers that are allocated once.

    A step writes the rows it brings behind the `length` rows kept so far, context rows first; :meth:`commit` then keeps
    the context rows. Query rows are not committed, so the next step overwrites them: they never survive their step.

    Shapes: `keys`, `values` (depth, batch, heads, capacity, head_dim).
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.keys = torch.empty(depth, batch, heads, capacity, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a step's rows (batch, heads, N, head_dim) of one layer; returns all keys and values it may see."""
        stop = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : stop] = key
        self.values[layer, :, :, self.length : stop] = value
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def commit(self, num_context: int) -> None:
        """Keep the first `num_context` rows of the step that has just run through all layers."""
        self.length += num_context
