"""Named model sizes."""

from __future__ import annotations

from typing import Any

from models.lpd import LPD, LPDConfig
from util.errors import UserError

# name: (embed_dim, depth, num_heads). The first three are the released ones, the others are for small data and tests.
MODEL_SIZES: dict[str, tuple[int, int, int]] = {
    "lpd_l": (1024, 24, 16),
    "lpd_xl": (1280, 36, 20),
    "lpd_xxl": (1536, 48, 24),
    "lpd_s": (512, 12, 8),
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
