"""Pre-norm transformer block with one attention forward for training and cached decoding.

Shape legend: `B` batch, `N` rows, `H` heads, `K` head_dim, `D` width. Parameter names are those of the released files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from models.kv_cache import KVCache


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection (output rows ordered q, k, v, each heads × head_dim).

    `attn_dropout` drops attention weights in training. The released models were trained with a fused kernel for which
    that flag had no effect, hence the default of 0 everywhere.
    """

    def __init__(self, dim: int, num_heads: int, proj_dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(
        self, x_BND: torch.Tensor, mask: torch.Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> torch.Tensor:
        """`mask` is bool (N, rows attended to), True where attention is allowed; the cache's rows come first."""
        B, N, D = x_BND.shape
        query, key, value = self.qkv(x_BND).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, K)
        if cache is not None:
            key, value = cache.update(layer, key, value)
        dropout = self.attn_dropout if self.training else 0.0
        out_BHNK = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.proj_drop(self.proj(out_BHNK.transpose(1, 2).reshape(B, N, D)))


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

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, proj_dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, proj_dropout, attn_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_dropout)

    def forward(
        self, x_BND: torch.Tensor, mask: torch.Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> torch.Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND), mask, cache, layer)
        return x_BND + self.mlp(self.norm2(x_BND))
