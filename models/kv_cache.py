"""The key/value cache of parallel decoding, an explicit object handed to the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of all layers in one buffer that is allocated once.

    A step writes the rows it brings behind the `length` rows kept so far, context rows first; :meth:`commit` then keeps
    the context rows. Query rows are not committed, so the next step overwrites them: they never survive their step.

    Shape: `key_values` (depth, 2, batch, heads, capacity, head_dim).
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
        self.key_values = torch.empty(depth, 2, batch, heads, capacity, head_dim, device=device, dtype=dtype)
        self.length = 0

    def attend(
        self, layer: int, num_context: int, query_BHNK: torch.Tensor, key_value_2BHNK: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one layer of a step whose first `num_context` rows are context, the others queries.

        Context rows see the kept rows and each other, queries see all (paper, section 3.3): two calls without a mask.
        In the last layer, whose context rows nobody reads, only the queries are attended.
        """
        stop = self.length + query_BHNK.shape[2]
        kept = self.key_values[layer]
        kept[:, :, :, self.length : stop] = key_value_2BHNK
        keys, values = kept[:, :, :, :stop]
        queries = F.scaled_dot_product_attention(query_BHNK[:, :, num_context:], keys, values)
        if layer == len(self.key_values) - 1:
            return queries
        seen = self.length + num_context
        keys, values = kept[:, :, :, :seen]
        context = F.scaled_dot_product_attention(query_BHNK[:, :, :num_context], keys, values)
        # Attention kernels return rows before heads in memory: joined so, no copy is needed later.
        return torch.cat([context.transpose(1, 2), queries.transpose(1, 2)], dim=1).transpose(1, 2)

    def commit(self, num_context: int) -> None:
        """Keep the first `num_context` rows of the step that has just run through all layers."""
        self.length += num_context
