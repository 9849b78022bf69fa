"""What a tokenizer's reconstructions are worth: distance from the pictures, codebook use, a classifier's view."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from tqdm import tqdm

from engine.scoring.features import FeatureExtractor
from engine.scoring.metrics import frechet_distance
from engine.scoring.statistics import FeatureStatistics
from engine.tokenizer_training.codebook import codebook_use
from tokenizers.vq_model import VQModel
from util.data.loading import Images, load_batches
from util.pictures import to_float, to_uint8

_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_LOST_SHARE = 0.05  # of the pictures: more unreadable ones than this are worth a warning
_BLURRED = 0.7  # SSIM
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
        blurred = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return blurred.squeeze(1).unflatten(0, x.shape[:2])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a * mean_a, blur(b * b) - mean_b * mean_b
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    value = value / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))
    return value.mean((1, 2, 3))


@torch.no_grad()
def judge(
    model: VQModel,
    interrupted: Callable[[], bool],
    *,
    extractor: FeatureExtractor,
    train_set: Images,
    held_out_set: Images,
    same_classes: bool,
    batch_size: int,
    num_workers: int,
) -> dict[str, Any]:
    """Scores of held-out pictures and of their reconstructions, in an extractor's features.

    Args:
        interrupted: asked before each batch; Interrupted is raised when it says yes.
        train_set: pictures to whose statistics both are compared.
        same_classes: whether the extractor numbers its classes as the held-out pictures do.

    Returns:
        ``extractor_sha256``; of at least two pictures ``frechet_distance_real`` and ``frechet_distance_reconstructed``;
        with the same classes ``class_accuracy_real`` and ``class_accuracy_reconstructed``, the shares read right.
    """

    def batches(dataset: Images, what: str) -> Iterator[list[Tensor]]:
        rows = list(BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False))
        with contextlib.closing(load_batches(dataset, rows, num_workers, extractor.device)) as loaded:
            for batch in tqdm(loaded, f"judging {what}", len(rows), leave=False, unit="batch", mininterval=1):
                if interrupted():
                    raise Interrupted
                yield batch

    def seen() -> FeatureStatistics:
        return FeatureStatistics(extractor.feature_dim, extractor.device)

    reference = seen()
    for pixels, _ in batches(train_set, "training pictures"):
        reference.update(extractor(pixels.permute(0, 3, 1, 2))[0])
    statistics = {"real": seen(), "reconstructed": seen()}
    right = dict.fromkeys(statistics, 0)
    for pixels, labels in batches(held_out_set, "held-out pictures"):
        made = to_uint8(model.decode(model.encode(to_float(pixels))))
        for name, shown in zip(statistics, (pixels, made), strict=True):
            features, logits = extractor(shown.permute(0, 3, 1, 2))
            statistics[name].update(features)
            right[name] += int((logits.argmax(1) == labels).sum())
    figures: dict[str, Any] = {}
    for name, found in statistics.items():
        if min(found.count, reference.count) > 1:
            distance = frechet_distance(reference.mu(), reference.sigma(), found.mu(), found.sigma())
            figures[f"frechet_distance_{name}"] = round(distance, 4)
        if same_classes:
            figures[f"class_accuracy_{name}"] = round(right[name] / found.count, 4)
    return figures | {"extractor_sha256": extractor.weights_hash}


def ceiling_warnings(metrics: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    """What keeps pictures made with this tokenizer from being better, one sentence each.

    Args:
        metrics: the figures of a training (:func:`engine.tokenizer_training.trainer.train_tokenizer`).
        lines: its measurements in order, each with ``step`` and ``psnr_db``.
    """
    found = []
    tuned = metrics["training"].get("vqgan_path") is not None  # its size is given
    sizes = "" if tuned else ", a smaller --stride or a larger --codebook_size"
    remedy = f"A longer training (--steps){sizes} helps."
    real, made = metrics.get("class_accuracy_real"), metrics.get("class_accuracy_reconstructed")
    if real is not None and made is not None and real - made > _LOST_SHARE:
        found.append(
            f"the tokenizer is the ceiling: its reconstructions are read right {made:.1%} of the time, the pictures "
            f"themselves {real:.1%}; nothing generated with it can do better. {remedy}"
        )
    if real is None and metrics.get("ssim", 1) < _BLURRED:
        found.append(
            f"the reconstructions are far from the pictures (SSIM {metrics['ssim']:.3f}), and nothing generated with "
            "this tokenizer can be sharper; whether the classes can still be told apart is measured with "
            f"--feature_extractor, a classifier of python -m engine.classifier. {remedy}"
        )
    size, tokens = metrics["tokenizer"]["codebook_size"], metrics.get("held_out_tokens", math.inf)
    reachable = 1 - math.exp(-tokens / size)  # share of the codes chosen at least once if all are equally frequent
    if metrics["codebook_share"] < _UNUSED * reachable and not tuned:
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
