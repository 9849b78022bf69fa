"""The rule by which the reference vectors' weights are rebuilt: they are drawn, not stored."""

from __future__ import annotations

import math

import numpy as np
import torch

_HALF_SCALE = ("class_emb.weight", "token_emb.weight", "mask_token", "fake_latent")


def reference_state_dict(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """Parameter names and shapes → the float32 weights that the reference vectors were made with.

    Names are visited in sorted order, each drawing one standard normal array; ``quantize.codebook_used`` draws nothing
    and is all zeros.
    """
    rng = np.random.default_rng(seed)
    state = {}
    for name in sorted(shapes):
        shape = list(shapes[name])
        if name == "quantize.codebook_used":
            state[name] = torch.zeros(shape)
            continue
        z = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        state[name] = _scaled(name, z)
    return state


def _scaled(name: str, z: torch.Tensor) -> torch.Tensor:
    if name in ("pos_embed", "quantize.embedding.weight"):
        return z
    if name in _HALF_SCALE:
        return 0.5 * z
    if z.ndim >= 2:
        scale = 2.0 if name.endswith("attn.qkv.weight") else 1.0
        return scale * z / math.sqrt(math.prod(z.shape[1:]))
    return 0.1 * z if name.endswith("bias") else 1 + 0.1 * z
