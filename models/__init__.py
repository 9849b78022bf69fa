"""Named model sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from models.lpd import LPD, LPDConfig
from util.errors import UserError

# name: (embed_dim, depth, num_heads). The first three are the released ones, the others are for small data and tests.
MODEL_SIZES: dict[str, tuple[int, int, int]] = {
    "lpd_l": (1024, 24, 16),
    "lpd_xl": (1280, 36, 20),
    "lpd_xxl": (1536, 48, 24),
    "lpd_s": (512, 12, 8),
    "lpd_mini": (192, 6, 6),
    "lpd_tiny": (128, 4, 4),
    "lpd_debug": (32, 2, 2),
}


def model_config(name: str, **overrides: Any) -> LPDConfig:
    """Configuration of a named size; `overrides` are further :class:`LPDConfig` fields.

    Raises:
        UserError: for an unknown name or an invalid field.
    """
    if name not in MODEL_SIZES:
        raise UserError(f"there is no model {name!r}; choose one of {', '.join(MODEL_SIZES)}.")
    embed_dim, depth, num_heads = MODEL_SIZES[name]
    return LPDConfig(**{"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, **overrides})


def build_model(name: str, **overrides: Any) -> LPD:
    """Build a named size with fresh weights, for example ``build_model("lpd_l", img_size=512)``."""
    return LPD(model_config(name, **overrides))


def config_of_weights(state: Mapping[str, torch.Tensor], stride: int = 16) -> LPDConfig:
    """The configuration of weights that record none, as the released files do: that of the named size they fit.

    Args:
        stride: the tokenizer's.

    Raises:
        UserError: for weights of no named size.
    """
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if {"pos_embed", "class_emb.weight", "token_emb.weight"} <= state.keys():
        positions, width = state["pos_embed"].shape[1:]
        for name, (embed_dim, depth, _) in MODEL_SIZES.items():
            if (width, len(blocks)) == (embed_dim, depth):
                counts = {"class_num": len(state["class_emb.weight"]), "vocab_size": len(state["token_emb.weight"])}
                return model_config(name, img_size=stride * math.isqrt(positions - 1), stride=stride, **counts)
    raise UserError(f"the weights are not those of {', '.join(MODEL_SIZES)}, and nothing records their sizes.")
