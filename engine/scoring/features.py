"""Feature extractors that scores are computed with: Inception-v3 for published numbers, or a classifier you trained.

Published FIDs use the Inception-v3 of 2015-12-05 in the form of torch-fidelity (`inception-v3-compat`), whose resizing
and pooling agree with the original TensorFlow graph. A data set far from ImageNet is better scored with a classifier
trained on it (:mod:`engine.classifier`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.scoring.classifier import load_classifier
from util.errors import UserError, reading
from util.files import sha256

logger = logging.getLogger(__name__)

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256_PREFIX = "6726825d"
INCEPTION_INSTEAD = (
    "or do without: images without scores (--feature_extractor none), or scores of a classifier of your own "
    "(python -m engine.classifier, --feature_extractor FILE)"
)
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS


@dataclass(frozen=True)
class FeatureExtractor:
    """Images → features and class logits; called with uint8 (B, 3, H, W), it returns float32 (B, d) and (B, K)."""

    name: str
    feature_dim: int  # d
    classes: tuple[str, ...] | None  # names in label order; None for Inception, whose classes are not those of any data
    weights_hash: str  # SHA-256 of the weights file
    device: torch.device
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    take_spatial: Callable[[], Tensor] | None = None  # spatial features of the last pass; Inception only

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # Scores are compared across papers, so the caller's autocast must not reach the extractor.
        with torch.autocast(self.device.type, enabled=False):
            features, logits = self.forward(images.to(self.device))
        return features.float(), logits.float()

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, logits, and the spatial features (B, 2023) of the same pass; (B, 0) where there are none."""
        features, logits = self(images)
        return features, logits, features[:, :0] if self.take_spatial is None else self.take_spatial().float()


def load_feature_extractor(
    name: str, device: torch.device | str = "cpu", weights_path: str | Path | None = None
) -> FeatureExtractor:
    """The extractor called ``name``.

    Args:
        name: ``inception-v3-compat`` (features ``2048`` and ``logits_unbiased`` of torch-fidelity), or the path of a
            classifier written by ``python -m engine.classifier``.
        weights_path: Inception's weights; by default they are looked for in torch's hub cache and downloaded to it.

    Raises:
        UserError: if the file is missing and can't be downloaded, or is not the one it should be.
    """
    device = torch.device(device)
    if name == INCEPTION:
        return _load_inception(download_inception() if weights_path is None else Path(weights_path), device)
    if not Path(name).is_file():
        raise UserError(f"feature extractor {name!r} is neither {INCEPTION} nor a file of python -m engine.classifier.")
    classifier, classes = load_classifier(name, device)
    return FeatureExtractor(
        name=f"classifier-{classifier.config.arch}",
        feature_dim=classifier.feature_dim,
        classes=classes,
        weights_hash=sha256(name),
        device=device,
        forward=classifier.features_and_logits,
    )


def inception_cache() -> Path:
    """Where Inception's weights are looked for and downloaded to: torch's hub cache."""
    return Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)


def download_inception() -> Path:
    """Get Inception's weights, unless they are in the cache; a download is checked by its hash.

    Raises:
        UserError: if they can't be downloaded; it says how to get them by hand, and what needs none.
    """
    cached = inception_cache()
    if not cached.is_file():
        logger.info("downloading %s to %s", INCEPTION_URL, cached)
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(cached), INCEPTION_SHA256_PREFIX)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the Inception weights can't be downloaded ({error}); get {INCEPTION_URL} and put it at {cached}, or "
                f"name the file with --inception_path; {INCEPTION_INSTEAD}."
            ) from None
    return cached


def _load_inception(path: Path, device: torch.device) -> FeatureExtractor:
    # torch-fidelity pulls in torchvision and more: seconds that a run without Inception does not need.
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    digest = sha256(path)
    if not digest.startswith(INCEPTION_SHA256_PREFIX):
        raise UserError(
            f"{path} is not {INCEPTION_FILE}: its SHA-256 starts with {digest[:8]} and should start with "
            f"{INCEPTION_SHA256_PREFIX}; delete it (a broken download?) and get it from {INCEPTION_URL}."
        )
    with reading(
        "the Inception file", path
    ):  # torch-fidelity unpickles without restrictions; what passes is plain data
        torch.load(path, map_location="cpu", weights_only=True)
    with torch.random.fork_rng(devices=[]):  # the constructor draws random weights first
        network: nn.Module = FeatureExtractorInceptionV3(
            INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions

    # The spatial features of sFID are `mixed_6/conv:0` of the TensorFlow graph: 17 × 17 × the first 7 channels.
    last: dict[str, Tensor] = {}
    network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
        lambda module, inputs, output: last.update(spatial=output[:, :SPATIAL_CHANNELS])
    )
    return FeatureExtractor(
        INCEPTION,
        feature_dim=2048,
        classes=None,
        weights_hash=digest,
        device=device,
        forward=network,
        take_spatial=lambda: last.pop("spatial").permute(0, 2, 3, 1).flatten(1),
    )
