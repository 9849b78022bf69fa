"""What a tokenizer's reconstructions are worth: distance from the pictures, codebook use, a classifier's view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from engine.scoring.features import FeatureExtractor
from engine.scoring.metrics import frechet_distance
from engine.scoring.statistics import FeatureStatistics
from engine.tokenizer_training.codebook import codebook_use
from tokenizers.vq_model import VQModel
from util.pictures import to_float, to_uint8

_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_LOST_SHARE = 0.05  # of the pictures: more unreadable ones than this are worth a warning
_STILL_RISING = 0.3  # dB in the last third of a training
_UNUSED = 0.5  # share of the codebook


class Interrupted(Exception):
    """A measurement was told to stop."""


@torch.no_grad()
def evaluate(
    model: VQModel, pixels: Tensor, batch_size: int, interrupted: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """PSNR (dB) and SSIM, means over images, and codebook use.

    Args:
        pixels: uint8 (N, H, H, 3) on the model's device.
        interrupted: asked before each batch; Interrupted is raised when it says yes.
    """
    counts = torch.zeros(model.config.codebook_size, device=pixels.device)
    psnr, similarity = [], []
    for batch in tqdm(pixels.split(batch_size), desc="measuring", unit="batch", leave=False, mininterval=1):
        if interrupted():
            raise Interrupted
        images = to_float(batch)
        indices = model.encode(images)
        made = model.decode(indices).clamp(-1, 1)
        mse = ((made - images) / 2).square().mean((1, 2, 3))
        psnr.append(-10 * mse.clamp_min(1e-10).log10())
        similarity.append(ssim((made + 1) / 2, (images + 1) / 2))
        counts += torch.bincount(indices.flatten(), minlength=len(counts))
    share, perplexity = codebook_use(counts)
    return {
        "psnr_db": round(float(torch.cat(psnr).mean()), 3),
        "ssim": round(float(torch.cat(similarity).mean()), 4),
        "codebook_share": round(share, 4),
        "codebook_perplexity": round(perplexity, 2),
    }


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images (N, 3, H, W) in [0, 1] → (N,), the mean over the colours.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): Gaussian window of
    11 pixels with σ = 1.5 (of fewer for smaller images), K1 = 0.01, K2 = 0.03, only windows within the image.
    """
    radius = min(_SSIM_RADIUS, (min(a.shape[-2:]) - 1) // 2)
    offsets = torch.arange(-radius, radius + 1, dtype=a.dtype, device=a.device)
    window = torch.softmax(-offsets.square() / (2 * _SSIM_SIGMA**2), 0)

    def blur(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1)).unflatten(0, x.shape[:2])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a * mean_a, blur(b * b) - mean_b * mean_b
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    value = value / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))
    return value.mean((1, 2, 3))


@torch.no_grad()
def judge(
    model: VQModel, extractor: FeatureExtractor, train: Tensor, held_out: Tensor, labels: Tensor | None, batch_size: int
) -> dict[str, float]:
    """Scores of the held-out pictures and of their reconstructions, in an extractor's features.

    Args:
        train: uint8 (N, H, H, 3), to whose statistics both are compared.
        held_out: likewise (M, H, H, 3).
        labels: of the held-out ones, int64 (M,), as the extractor numbers its classes; None where it has others.

    Returns:
        ``frechet_distance_real`` and ``frechet_distance_reconstructed``; with labels ``class_accuracy_real`` and
        ``class_accuracy_reconstructed``, the shares of pictures that are read right.
    """

    def features_of(pixels: Tensor, reconstruct: bool, what: str) -> tuple[FeatureStatistics, Tensor]:
        statistics, logits = FeatureStatistics(extractor.feature_dim, extractor.device), []
        for batch in tqdm(pixels.split(batch_size), desc=f"judging {what}", unit="batch", leave=False, mininterval=1):
            if reconstruct:
                batch = to_uint8(model.decode(model.encode(to_float(batch))))
            features, scores = extractor(batch.permute(0, 3, 1, 2))
            statistics.update(features)
            logits.append(scores.cpu())
        return statistics, torch.cat(logits)

    reference, _ = features_of(train, False, "training pictures")
    figures = {}
    for name, reconstruct in (("real", False), ("reconstructed", True)):
        statistics, logits = features_of(held_out, reconstruct, f"{name} pictures")
        distance = frechet_distance(reference.mu, reference.sigma, statistics.mu, statistics.sigma)
        figures[f"frechet_distance_{name}"] = round(distance, 4)
        if labels is not None:
            right = logits.argmax(1) == labels.cpu()
            figures[f"class_accuracy_{name}"] = round(float(right.double().mean()), 4)
    return figures


def ceiling_warnings(metrics: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    """What keeps pictures made with this tokenizer from being better, one sentence each.

    Args:
        metrics: the figures of :func:`evaluate` and perhaps :func:`judge`, and ``tokenizer`` (its configuration).
        lines: the measurements of the training in order, each with ``step`` and ``psnr_db``.
    """
    found = []
    real, made = metrics.get("class_accuracy_real"), metrics.get("class_accuracy_reconstructed")
    if real is not None and made is not None and real - made > _LOST_SHARE:
        found.append(
            f"the tokenizer is the ceiling: its reconstructions are read right {made:.1%} of the time, the pictures "
            f"themselves {real:.1%}; nothing generated with it can do better. A longer training (--steps), a smaller "
            "--stride or a larger --codebook_size raises it."
        )
    size = metrics["tokenizer"]["codebook_size"]
    if metrics["codebook_share"] < _UNUSED:
        found.append(
            f"only {metrics['codebook_share']:.1%} of the {size} codes are in use: a smaller --codebook_size would do "
            "as well, and is easier to generate."
        )
    last = metrics["step"]
    earlier = [line["psnr_db"] for line in lines if last / 2 <= line["step"] <= last * 2 / 3]
    if earlier and metrics["psnr_db"] - earlier[-1] > _STILL_RISING:
        found.append(
            f"the reconstructions were still getting better ({metrics['psnr_db'] - earlier[-1]:+.2f} dB in the last "
            "third): the same command with more --steps goes on from here."
        )
    return found
