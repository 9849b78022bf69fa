"""Pre-norm transformer block, one forward for training and cached decoding: who sees whom is the caller's.

Shape legend: `B` batch, `N` rows, `H` heads, `K` head_dim, `D` width. Parameter names are those of the released files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# query (B, H, N, K), key and value (2, B, H, N, K) → attended rows (B, H, M, K): all N rows, or the last M only.
Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Attention(nn.Module):
    """The projections around multi-head self-attention (fused qkv, output rows ordered q, k, v, each heads × K)."""

    def __init__(self, dim: int, num_heads: int, proj_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def project_in(self, x_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query (B, H, N, K); key and value (2, B, H, N, K)."""
        B, N, _ = x_BND.shape
        qkv = self.qkv(x_BND).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1:]

    def project_out(self, out_BHNK: torch.Tensor) -> torch.Tensor:
        """Attended rows (B, N, D)."""
        return self.proj_drop(self.proj(out_BHNK.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between, dropout after each."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x_BND)))))


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, proj_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, proj_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_dropout)

    def before_attention(self, x_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query (B, H, N, K); key and value (2, B, H, N, K)."""
        return self.attn.project_in(self.norm1(x_BND))

    def after_attention(self, x_BND: torch.Tensor, out_BHMK: torch.Tensor) -> torch.Tensor:
        """Rows (B, M, D) for the attended rows, the last M of the N in `x_BND`."""
        x_BMD = x_BND[:, -out_BHMK.shape[2] :] + self.attn.project_out(out_BHMK)
        return x_BMD + self.mlp(self.norm2(x_BMD))

    def forward(self, x_BND: torch.Tensor, attend: Attend) -> torch.Tensor:
        return self.after_attention(x_BND, attend(*self.before_attention(x_BND)))
