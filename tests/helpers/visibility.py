"""Who sees whom in training, one pair of rows at a time: the oracle of the masks."""

from __future__ import annotations

import torch


def brute_force_visibility(group_sizes: list[int]) -> torch.Tensor:
    """The paper's table for the class token, the codes of all tokens but the last, and the queries: bool (2L, 2L)."""
    codes = [("code", s) for s, size in enumerate(group_sizes, 1) for _ in range(size)]
    queries = [("query", s) for _, s in codes]
    rows = [("class", 0), *codes[:-1], *queries]

    def visible(row: tuple[str, int], column: tuple[str, int]) -> bool:
        (kind, s), (column_kind, c) = row, column
        if column_kind == "class":
            return True
        if kind == "class":
            return False
        if kind == "code":
            return column_kind == "code" and c <= s
        return c < s if column_kind == "code" else c == s

    return torch.tensor([[visible(row, column) for column in rows] for row in rows])
