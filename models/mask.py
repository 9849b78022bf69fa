"""Who may attend to whom in training, as a dense mask and as a block mask of FlexAttention.

The whole image is one sequence of R = 2L rows whatever the schedule: L context rows (class token, then the codes of all
tokens of the order but the last), then L queries. Codes of the last group are seen by nobody but themselves.

Shape legend: `L` tokens of an image, `R` rows of the training pass, `M` the last M of them, `K` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.block import Attend

# (batch, head, row, column) → bool; the indices are tensors that broadcast.
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _mask_mod(group_sizes: Sequence[int], num_rows: int, device: torch.device) -> MaskMod:
    """The rule for the last `num_rows` rows and all R columns: the paper's section 3.2.

    A row sees the rows of its own kind (context or query) and group, and the context of earlier groups. The class token
    is a group of its own before the first.
    """
    L, repeats = sum(group_sizes), torch.tensor(group_sizes, device=device)
    groups = torch.arange(1, len(group_sizes) + 1, dtype=torch.int32, device=device)
    group_L = groups.repeat_interleave(repeats, output_size=L)  # without the size it would read the repeats back
    group_R = torch.cat([group_L.new_zeros(1), group_L[:-1], group_L])
    first_row = 2 * L - num_rows

    def visible(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        row = row + first_row
        same_kind = (row < L) == (column < L)
        own, earlier = group_R[column] == group_R[row], group_R[column] < group_R[row]
        return (own & same_kind) | (earlier & (column < L))

    return visible


def training_mask(group_sizes: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Dense mask of the one-pass training sequence.

    Args:
        group_sizes: tokens per group, summing to L.

    Returns:
        bool (R, R) with R = 2L; entry (i, j) is True where row i may attend to row j.
    """
    rows = torch.arange(2 * sum(group_sizes), device=device)
    return _mask_mod(group_sizes, len(rows), rows.device)(rows, rows, rows[:, None], rows[None, :])


def training_block_mask(group_sizes: Sequence[int], num_rows: int, device: torch.device | str = "cpu") -> BlockMask:
    """The last `num_rows` rows of the same mask for :func:`torch.nn.attention.flex_attention.flex_attention`."""
    device = torch.device(device)
    mask_mod = _mask_mod(group_sizes, num_rows, device)
    return create_block_mask(mask_mod, None, None, num_rows, 2 * sum(group_sizes), device)


# Kept for every schedule of a run: the published lists have nine and fourteen. Inference mode would make tensors unfit
# for training.
@lru_cache(maxsize=64)
def _kept_mask(group_sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return training_mask(group_sizes, device)


@lru_cache(maxsize=128)
def _kept_block_mask(group_sizes: tuple[int, ...], num_rows: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):
        return training_block_mask(group_sizes, num_rows, device)


@cache
def _fused_flex_attention() -> Any:
    """FlexAttention as one kernel for each shape; without compilation it would materialise all scores."""
    return torch.compile(flex_attention, dynamic=False)


def _attend_sdpa(mask_MR: torch.Tensor, dropout: float, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
    # On a GPU cuDNN may serve this: whatever the schedule there are two shapes, hence two plans. Decoding, where every
    # step has a shape of its own, leaves cuDNN out.
    query_BHMK, (key, value) = query[:, :, -len(mask_MR) :], key_value.unbind()
    return F.scaled_dot_product_attention(query_BHMK, key, value, attn_mask=mask_MR, dropout_p=dropout)


def _attend_flex(
    attention: Any,
    mask: BlockMask,
    num_rows: int,
    query: torch.Tensor,
    key_value: torch.Tensor,
) -> torch.Tensor:
    key, value = key_value.unbind()
    return attention(query[:, :, -num_rows:], key, value, block_mask=mask)


def training_attention(
    group_sizes: Sequence[int], device: torch.device, kind: str = "sdpa", dropout: float = 0.0
) -> tuple[Attend, Attend]:
    """Attention of the training pass for all blocks but the last, and for the last, of which only queries are read.

    Args:
        kind: "sdpa", a dense mask, or "flex", a block mask (compiled on CUDA; a GPU needs head_dim ≥ 16).
        dropout: on attention weights, for "sdpa" only.
    """
    sizes, L = tuple(group_sizes), sum(group_sizes)
    if kind == "flex":
        attention: Any = _fused_flex_attention() if device.type == "cuda" else flex_attention
        every, queries = (partial(_attend_flex, attention, _kept_block_mask(sizes, n, device), n) for n in (2 * L, L))
    else:
        mask_RR = _kept_mask(sizes, device)
        every, queries = (partial(_attend_sdpa, mask, dropout) for mask in (mask_RR, mask_RR[L:]))
    return every, queries
