"""One pass of a tokenizer in training: reconstructions, and the loss terms that do not need a discriminator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.tokenizer_training.adversarial import at_least_float32
from engine.tokenizer_training.perceptual import LPIPS
from tokenizers.vq_model import VQModel

_COMMITMENT = 0.25  # weight of the commitment loss (arXiv:1711.00937, arXiv:2110.04627)


@dataclass(frozen=True)
class Pass:
    """What a forward pass leaves; loss terms are weighted scalars."""

    images: Tensor  # reconstructions, at least float32 (B, 3, H, H), with their graph
    reconstruction: dict[str, Tensor]  # terms that follow from the images
    codebook: dict[str, Tensor]  # terms of the quantisation; empty without it
    features: Tensor  # detached unit vectors before quantisation (N, K)
    indices: Tensor | None  # codes (B, L); None without quantisation


def forward(
    model: VQModel, images: Tensor, quantise: bool, lpips: LPIPS | None = None, lpips_weight: float = 1.0
) -> Pass:
    """Encode images (B, 3, H, H), quantise them with the straight-through estimator if asked to, and decode them."""
    features = model.features(images)
    codebook: dict[str, Tensor] = {}
    indices, decoder_input = None, features
    if quantise:
        indices = model.quantize.nearest(features)
        entries = model.quantize.lookup(indices)
        codebook["codebook"] = (entries - features.detach()).square().mean()
        codebook["commitment"] = _COMMITMENT * (entries.detach() - features).square().mean()
        decoder_input = features + (entries - features).detach()
    made = at_least_float32(model.decode_features(decoder_input))
    error = made - images
    reconstruction = {"l1": error.abs().mean(), "l2": error.square().mean()}
    if lpips is not None:
        reconstruction["lpips"] = lpips_weight * lpips(images, made).mean()
    return Pass(made, reconstruction, codebook, features.detach().flatten(0, 1), indices)
