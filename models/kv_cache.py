"""The key/value cache of parallel decoding, an explicit object handed to the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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

    def attend(
        self, layer: int, num_context: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one layer of a step whose first `num_context` rows are context, the others queries.

        Context rows see the kept rows and each other, queries see all (paper, section 3.3): two calls without a mask.
        In the last layer, whose context rows nobody reads, only the queries are attended.

        Args:
            query, key, value: the step's rows (batch, heads, N, head_dim).
        """
        stop = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : stop] = key
        self.values[layer, :, :, self.length : stop] = value
        keys, values = self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]
        queries = F.scaled_dot_product_attention(query[:, :, num_context:], keys, values)
        if layer == len(self.keys) - 1:
            return queries
        seen = self.length + num_context
        context = F.scaled_dot_product_attention(query[:, :, :num_context], keys[:, :, :seen], values[:, :, :seen])
        # Attention kernels return rows before heads in memory: joined so, no copy is needed later.
        return torch.cat([context.transpose(1, 2), queries.transpose(1, 2)], dim=1).transpose(1, 2)

    def commit(self, num_context: int) -> None:
        """Keep the first `num_context` rows of the step that has just run through all layers."""
        self.length += num_context
