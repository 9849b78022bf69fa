"""Who may attend to whom in training. Shape legend: `L` tokens of an image, `R` rows of the training pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def training_mask(group_sizes: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Mask of the one-pass training sequence ``[class token, codes of groups 1 … n-1, queries of groups 1 … n]``.

    A code of group s sees the class token, earlier groups and its whole own group. A query of group s sees the class
    token, the codes of groups before s, and the queries of its own group. Nobody else sees a query (paper, section
    3.2).

    Args:
        group_sizes: tokens per group, summing to L.

    Returns:
        bool (R, R) with R = 1 + 2L - group_sizes[-1]; entry (i, j) is True where row i may attend to row j.
    """
    # Made on the host: repeats that live on a device would have to be read back.
    group_of_token = torch.arange(1, len(group_sizes) + 1).repeat_interleave(torch.tensor(group_sizes)).to(device)
    context = torch.cat([group_of_token.new_zeros(1), group_of_token[: len(group_of_token) - group_sizes[-1]]])
    group = torch.cat([context, group_of_token])
    is_query = torch.arange(len(group), device=device) >= len(context)
    newest_visible_context = group - is_query.long()
    sees_context = ~is_query[None, :] & (group[None, :] <= newest_visible_context[:, None])
    sees_query = is_query[None, :] & is_query[:, None] & (group[None, :] == group[:, None])
    return sees_context | sees_query
