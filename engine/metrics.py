"""The command that computes feature statistics of images, to score against them later, or scores images:

    python -m engine.metrics --data_path data/train --img_size 32 --feature_extractor classifier.pt --output ref.npz
    python -m engine.metrics --data_path samples --img_size 256 --reference_statistics adm_in256_stats.npz

With ``--vqgan_path`` it scores what a tokenizer makes of the images: the floor of all that is generated with it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.scoring.config import ScoringConfig
from engine.scoring.features import FeatureExtractor, load_feature_extractor
from engine.scoring.metrics import conventions, score
from engine.scoring.statistics import FeatureStatistics, load_reference_statistics, save_reference_statistics
from tokenizers import VQModel, load_tokenizer
from util.cli import Parser, exit_on_user_error, from_args
from util.config import MAX_SIDE, check, part, setting
from util.data.classes import ClassChoice
from util.data.images import ImageDataset, open_images
from util.data.loading import image_batches
from util.dist import DeviceConfig, resolve_device
from util.errors import UserError
from util.files import check_output_file, sha256
from util.logger import setup_logging
from util.pictures import to_float, to_uint8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricsConfig(DeviceConfig):
    """Which images are measured, and what becomes of their statistics."""

    data_path: Path = setting(help="folder of images, in subfolders or not, a list photos.csv, or photos.npz:test")
    img_size: int = setting(
        help="side of the centre crops, pixels: the size that is generated", at_least=1, at_most=MAX_SIDE
    )
    vqgan_path: Path | None = setting(None, "score what this tokenizer makes of the images")
    output: Path | None = setting(None, "write the statistics to this npz")
    batch_size: int = setting(64, "images per batch", at_least=1)
    choice: ClassChoice = part(default_factory=ClassChoice)
    scoring: ScoringConfig = part(default_factory=ScoringConfig)

    def __post_init__(self) -> None:
        check(self)
        if self.output is None and self.scoring.reference_statistics is None:
            raise UserError("nothing to do: give --output to save statistics, --reference_statistics to score.")
        if self.scoring.feature_extractor is None:
            raise UserError("--feature_extractor none leaves nothing to compute statistics of.")


@torch.no_grad()
def reconstruct(tokenizer: VQModel, images: Tensor) -> Tensor:
    """What a tokenizer makes of images: uint8 (B, 3, H, W) → the same, on the tokenizer's device."""
    device = next(tokenizer.parameters()).device
    x = to_float(images.permute(0, 2, 3, 1).to(device))
    return to_uint8(tokenizer.decode(tokenizer.encode(x))).permute(0, 3, 1, 2)


def extract(
    images: ImageDataset, extractor: FeatureExtractor, tokenizer: VQModel | None, batch_size: int
) -> tuple[FeatureStatistics, Tensor]:
    """Statistics of the features of all images, and their logits (N, K); with a tokenizer, of what it makes of them."""
    statistics, all_logits = FeatureStatistics(extractor.feature_dim, extractor.device), []
    with tqdm(total=len(images), desc=f"features of {images.source}", unit="image") as progress:
        for pixels in image_batches(images, batch_size):
            batch = pixels.permute(0, 3, 1, 2)
            features, logits = extractor(batch if tokenizer is None else reconstruct(tokenizer, batch))
            statistics.update(features)
            all_logits.append(logits.cpu())
            progress.update(len(batch))
    return statistics, torch.cat(all_logits)


def run(config: MetricsConfig) -> None:
    """Open and check all inputs, extract the features, write the statistics, print the scores."""
    if config.output is not None:
        check_output_file(config.output)
    scoring = config.scoring
    assert scoring.feature_extractor is not None
    path = scoring.reference_statistics
    reference = None if path is None else load_reference_statistics(path)
    images = open_images(config.data_path, config.img_size, labelled=False, choice=config.choice)
    device = resolve_device(config.device)
    extractor = load_feature_extractor(scoring.feature_extractor, device, scoring.inception_path)
    if reference is not None:
        reference.check(extractor, config.img_size)
    tokenizer = None if config.vqgan_path is None else load_tokenizer(config.vqgan_path, device)

    statistics, logits = extract(images, extractor, tokenizer, config.batch_size)
    metadata = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.weights_hash,
        "num_images": len(images),
        "img_size": config.img_size,
        "data_path": str(config.data_path),
    }
    if config.vqgan_path is not None:
        metadata["tokenizer_sha256"] = sha256(config.vqgan_path)
    if config.output is not None:
        save_reference_statistics(config.output, statistics, metadata)
        logger.info("statistics of %d images written to %s", len(images), config.output)
    if reference is not None:
        source = {"reference_statistics": str(reference.path), "reference_sha256": reference.sha256}
        scores = score(statistics, logits, reference, extractor.name)
        if extractor.classes == tuple(images.classes):
            scores["class_accuracy"] = (logits.argmax(1) == torch.from_numpy(images.labels)).double().mean().item()
        print(json.dumps(metadata | source | scores | {"conventions": conventions(scores)}))


def main() -> None:
    parser = Parser(
        prog="python -m engine.metrics",
        description="Feature statistics of images (--output), or their scores (--reference_statistics).",
    )
    parser.add_config(MetricsConfig, skip=("adm_suite",))
    config = from_args(MetricsConfig, parser.parse_args())
    setup_logging()
    run(config)


if __name__ == "__main__":
    exit_on_user_error(main)
