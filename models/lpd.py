"""The LPD transformer (arXiv 2507.01957, section 3): learnable position queries predict any group from any context.

Shape legend: `B` images, `L` tokens of an image, `N` rows, `D` width, `V` codes. Parameter names and shapes are those
of the released checkpoints (`mit-han-lab/lpd_*`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.block import Attend, Block
from models.kv_cache import KVCache
from models.mask import training_attention
from util.config import MAX_COUNT, check, setting
from util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Regularisation:
    """What a model does in training only; nothing of it is in the weights."""

    label_drop_prob: float = setting(0.1, "share of samples trained without class, for guidance", at_least=0, at_most=1)
    proj_dropout: float = setting(0.0, "after attention and in the MLP", at_least=0, at_most=1)
    attn_dropout: float = setting(0.0, "on attention weights; the published models used none", at_least=0, at_most=1)
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory")


@dataclass(frozen=True)
class LPDConfig(Regularisation):
    """Sizes and regularisation of one model; `vocab_size` is the tokenizer's codebook size."""

    img_size: int = 256
    stride: int = 16
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    class_num: int = 1000
    vocab_size: int = 16384
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check(self, prefix="")
        for name in ("img_size", "stride", "embed_dim", "depth", "num_heads", "class_num", "vocab_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_COUNT:
                raise UserError(f"{name} is {value!r}; it must be a whole number from 1 to {MAX_COUNT}.")
        if self.img_size % self.stride:
            raise UserError(f"img_size {self.img_size} is not a multiple of the tokenizer's stride {self.stride}.")
        if self.embed_dim % self.num_heads:
            raise UserError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}.")
        if not 1 <= self.embed_dim * self.mlp_ratio <= MAX_COUNT:
            raise UserError(f"mlp_ratio is {self.mlp_ratio}; it must be positive.")

    @property
    def grid_size(self) -> int:
        """Height and width of the token grid."""
        return self.img_size // self.stride

    @property
    def num_tokens(self) -> int:
        """L, tokens per image."""
        return self.grid_size**2


class LPD(nn.Module):
    """Decoder-only transformer over context rows (class token, codes) and position queries."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.class_emb = nn.Embedding(config.class_num, D)
        self.token_emb = nn.Embedding(config.vocab_size, D)
        self.fake_latent = nn.Parameter(torch.empty(1, D))  # the "no class" of guidance and label drop
        self.mask_token = nn.Parameter(torch.empty(1, 1, D))  # the query vector
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens + 1, D))  # slot 0: class token
        self.z_proj_ln = nn.LayerNorm(D, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(D, config.num_heads, config.mlp_ratio, config.proj_dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """normal(0, 0.02) for embeddings, positions, query and no-class vectors; Xavier uniform for linear weights."""
        for parameter in (self.class_emb.weight, self.token_emb.weight, self.fake_latent, self.mask_token):
            nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed_class(self, labels_B: torch.Tensor | None, batch: int) -> torch.Tensor:
        """Class tokens (B, 1, D); `labels_B=None` gives the "no class" token to all `batch` images."""
        class_BD = self.fake_latent.expand(batch, -1) if labels_B is None else self.class_emb(labels_B)
        return self.z_proj_ln(class_BD[:, None] + self.pos_embed[:, :1])

    def embed_codes(self, codes_BN: torch.Tensor, positions_BN: torch.Tensor) -> torch.Tensor:
        """Context tokens (B, N, D) of codes that stand at raster indices `positions_BN`."""
        return self.z_proj_ln(self.token_emb(codes_BN) + F.embedding(positions_BN + 1, self.pos_embed[0]))

    def embed_queries(self, positions_BN: torch.Tensor) -> torch.Tensor:
        """Position queries (B, N, D) for raster indices `positions_BN`."""
        return self.z_proj_ln(self.mask_token + F.embedding(positions_BN + 1, self.pos_embed[0]))

    def first_step(
        self, labels_B: torch.Tensor | None, targets_BQ: torch.Tensor, guided: bool, cache: KVCache
    ) -> torch.Tensor:
        """Logits (G, Q, V) of the first decoding step: class token and queries; G = 2B with `guided`, whose second half
        has no class, else B."""
        B = len(targets_BQ)
        class_G1D, queries_GQD = self.embed_class(labels_B, B), self.embed_queries(targets_BQ)
        if guided:
            class_G1D = torch.cat([class_G1D, self.embed_class(None, B)])
            queries_GQD = queries_GQD.repeat(2, 1, 1)
        return self.decode_step(torch.cat([class_G1D, queries_GQD], dim=1), 1, cache)

    def next_step(
        self,
        codes_BN: torch.Tensor,
        known_BN: torch.Tensor,
        targets_BQ: torch.Tensor,
        guided: bool,
        cache: KVCache,
    ) -> torch.Tensor:
        """Logits (G, Q, V) of a later step: the codes at the positions of the step before, and queries for its own."""
        rows_GND = self.embed_step(codes_BN, known_BN, targets_BQ, guided)
        return self.decode_step(rows_GND, known_BN.shape[1], cache)

    def embed_step(
        self, codes_BN: torch.Tensor, known_BN: torch.Tensor, targets_BQ: torch.Tensor, guided: bool
    ) -> torch.Tensor:
        """Rows (G, N + Q, D) of a decoding step: the codes at positions `known_BN`, then queries for `targets_BQ`."""
        rows_BND = torch.cat([self.embed_codes(codes_BN, known_BN), self.embed_queries(targets_BQ)], dim=1)
        return rows_BND.repeat(2, 1, 1) if guided else rows_BND

    def transform(self, rows_BND: torch.Tensor, attend: Attend, attend_last: Attend) -> torch.Tensor:
        """All blocks of the training pass, without the final norm: the rows that the last block attends."""
        for block in self.blocks:
            attend_now = attend_last if block is self.blocks[-1] else attend
            if self.config.grad_checkpointing and self.training:
                rows_BND = checkpoint(block, rows_BND, attend_now, use_reentrant=False)
            else:
                rows_BND = block(rows_BND, attend_now)
        return rows_BND

    def decode_step(self, rows_BND: torch.Tensor, num_context: int, cache: KVCache) -> torch.Tensor:
        """One cached decoding step: rows of `num_context` new context tokens, then Q queries → logits (B, Q, V).

        Keys and values of the context rows are kept in the cache, those of the queries are not.
        """
        for layer, block in enumerate(self.blocks):
            rows_BND = block(rows_BND, partial(cache.attend, layer, num_context))
        cache.commit(num_context)
        return self.predict(rows_BND)

    def predict(self, queries_BND: torch.Tensor) -> torch.Tensor:
        """Logits (B, N, V) of transformed query rows; float32 under autocast too, since guidance magnifies rounding."""
        return self.logits(self.norm(queries_BND))

    def logits(self, features_BND: torch.Tensor) -> torch.Tensor:
        """:meth:`predict` without its first step, the norm."""
        device = features_BND.device.type
        if not torch.is_autocast_enabled(device):
            return self.head(features_BND)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            features, weight = features_BND.to(dtype).flatten(0, 1), self.head.weight.to(dtype)
            if device == "cuda":  # narrow operands, wide result
                logits = torch.mm(features, weight.T, out_dtype=torch.float32)
            else:
                logits = features.float() @ weight.T.float()
        return logits.unflatten(0, features_BND.shape[:2])

    def forward(
        self,
        tokens_BL: torch.Tensor,
        labels_B: torch.Tensor | None,
        orders_BL: torch.Tensor,
        group_sizes: Sequence[int],
        label_drop_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One training pass over the whole image.

        Args:
            tokens_BL: int64 codes in raster order.
            labels_B: int64 classes, or None for "no class" everywhere.
            orders_BL: int64, each row a permutation of raster indices in generation order.
            group_sizes: tokens per step, summing to L.
            label_drop_B: bool, True where the class is replaced by "no class". By default drawn with probability
                `label_drop_prob` in training mode and nowhere else.

        Returns:
            Logits (B, L, V) in generation order: row t predicts the code at raster index orders_BL[:, t].
        """
        return self.head(self.features(tokens_BL, labels_B, orders_BL, group_sizes, label_drop_B))

    def features(
        self,
        tokens_BL: torch.Tensor,
        labels_B: torch.Tensor | None,
        orders_BL: torch.Tensor,
        group_sizes: Sequence[int],
        label_drop_B: torch.Tensor | None = None,
        attention: str = "sdpa",
    ) -> torch.Tensor:
        """:meth:`forward` without its last step, the head: (B, L, D), for a loss that is computed chunk by chunk.

        Args:
            attention: "sdpa" or "flex", see :func:`models.mask.training_attention`.
        """
        B, L = tokens_BL.shape
        self.check_inputs(orders_BL, group_sizes)
        if tokens_BL.shape != orders_BL.shape:
            raise UserError(f"tokens have shape {(B, L)}, orders {tuple(orders_BL.shape)}; they must be the same.")
        class_B1D = self.embed_class(labels_B, B)
        if label_drop_B is None and self.training and self.config.label_drop_prob > 0:
            label_drop_B = torch.rand(B, device=tokens_BL.device) < self.config.label_drop_prob
        if label_drop_B is not None:
            class_B1D = torch.where(label_drop_B[:, None, None], self.embed_class(None, B), class_B1D)
        # The code of the last token is seen by nobody, so that there are L context rows whatever the schedule.
        known_BN = orders_BL[:, :-1]
        context = self.embed_codes(tokens_BL.gather(1, known_BN), known_BN)
        rows = torch.cat([class_B1D, context, self.embed_queries(orders_BL)], dim=1)
        # Fused kernels of the released models' training ignored attention dropout, hence its default of 0.
        dropout = self.config.attn_dropout if self.training else 0.0
        return self.norm(self.transform(rows, *training_attention(group_sizes, rows.device, attention, dropout)))

    def check_inputs(self, orders_BL: torch.Tensor, group_sizes: Sequence[int]) -> None:
        """Raise UserError where shapes and schedule do not fit this model (no read-back of device values)."""
        L = self.config.num_tokens
        if any(size < 1 for size in group_sizes) or sum(group_sizes) != L:
            raise UserError(
                f"group sizes {list(group_sizes)} sum to {sum(group_sizes)}; they must be positive and sum to the "
                f"{L} tokens of the {self.config.grid_size}×{self.config.grid_size} grid."
            )
        if orders_BL.ndim != 2 or orders_BL.shape[1] != L:
            raise UserError(f"orders have shape {tuple(orders_BL.shape)}; they must be (batch, {L}).")


def resize_pos_embed(pos_embed: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Resize positions (1, L₀+1, D) to another square grid: slot 0 is kept, the others are resized bicubically."""
    old_size, new_size = math.isqrt(pos_embed.shape[1] - 1), math.isqrt(num_tokens)
    if old_size**2 != pos_embed.shape[1] - 1 or new_size**2 != num_tokens:
        raise UserError(f"pos_embed of shape {tuple(pos_embed.shape)} cannot be resized to {num_tokens} tokens.")
    if old_size == new_size:
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, (old_size, old_size)).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(new_size, new_size), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def load_weights(
    model: LPD, state: dict[str, torch.Tensor], source: str, resize: bool = False, new_classes: bool = False
) -> None:
    """Load a state dict; everything must fit. A model of shapes only takes its tensors (:mod:`util.shapes`).

    Args:
        source: the file's name, for messages.
        resize: let positions of another grid be resized, to train further at another resolution.
        new_classes: leave the class table of `model` as it is, to train further on other classes.

    Raises:
        UserError: naming the first parameter that is missing, unknown or of another shape.
    """
    own = model.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise UserError(f"{source} is not a checkpoint of this model: {missing[0]} is missing ({len(missing)} in all).")
    if unknown := sorted(state.keys() - own.keys()):
        raise UserError(f"{source} is not a checkpoint of this model: {unknown[0]} is unknown ({len(unknown)} in all).")
    state = dict(state)
    if new_classes:
        state["class_emb.weight"] = own["class_emb.weight"]
    if resize and state["pos_embed"].ndim == 3 and state["pos_embed"].shape[2] == model.config.embed_dim:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], model.config.num_tokens)
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise UserError(
                f"{source} is a checkpoint of another size: {name} is {tuple(state[name].shape)}, "
                f"the model's is {tuple(value.shape)}."
            )
    assign = model.pos_embed.is_meta
    if assign:
        state = {name: state[name].to(value.dtype) for name, value in own.items()}
    model.load_state_dict(state, assign=assign)
