"""The command that trains a small image classifier, a feature extractor for data far from ImageNet:

    python -m engine.classifier --data_path data/train --test_path data/test --output classifier.pt

Any architecture of timm serves. The whole data set is kept in memory as bytes and augmented in batches on the device.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.scoring.classifier import (
    Classifier,
    ClassifierConfig,
    ClassifierTrainConfig,
    accuracy,
    save_classifier,
    train_classifier,
)
from util.cli import Parser, exit_on_user_error, from_args
from util.config import part, record, setting
from util.data.classes import ClassChoice
from util.data.images import open_images
from util.data.loading import load_all
from util.dist import DeviceConfig, resolve_device
from util.errors import UserError
from util.logger import setup_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassifierRunConfig(DeviceConfig):
    """Which classifier is trained on which images, and where it is written."""

    data_path: Path = setting(help="training images: a folder per class, a list photos.csv, or photos.npz:train")
    test_path: Path = setting(help="held-out images of the same classes, likewise")
    output: Path = setting(help="classifier file to write (.pt)")
    arch: str = setting("test_resnet", "timm architecture; test_resnet has 0.4M parameters and 96 features")
    img_size: int = setting(32, "side of the centre crops, pixels")
    input_size: int | None = setting(None, "side the network sees (default: --img_size); larger suits deep networks")
    choice: ClassChoice = part(default_factory=ClassChoice)
    train: ClassifierTrainConfig = part(default_factory=ClassifierTrainConfig)


def run(config: ClassifierRunConfig) -> None:
    """Train, measure on the held-out images, write the classifier and print what is recorded with it as JSON."""
    device = resolve_device(config.device)
    train_set, test_set = (
        open_images(path, config.img_size, choice=config.choice) for path in (config.data_path, config.test_path)
    )
    if train_set.classes != test_set.classes:
        raise UserError(f"--test_path has classes {', '.join(test_set.classes)}, which are not those of --data_path.")
    torch.manual_seed(config.train.seed)
    input_size = config.input_size or config.img_size
    model = Classifier(ClassifierConfig(config.arch, len(train_set.classes), config.img_size, input_size))
    (images, labels), (test_images, test_labels) = load_all(train_set), load_all(test_set)
    images, test_images = (pixels.permute(0, 3, 1, 2).contiguous() for pixels in (images, test_images))

    start = time.perf_counter()
    train_classifier(model, images, labels, config.train, device)
    metadata: dict[str, Any] = {
        "test_accuracy": accuracy(model, test_images, test_labels, device),
        "train_images": len(images),
        "test_images": len(test_images),
        "train_sec": round(time.perf_counter() - start, 1),
        "device": str(device),
        "train": record(config.train),
    }
    save_classifier(model, tuple(train_set.classes), config.output, metadata)
    share = 100 * metadata["test_accuracy"]
    logger.info("%s: reads %.2f %% of %d held-out images right", config.output, share, len(test_images))
    print(json.dumps(metadata))


def main() -> None:
    parser = Parser(
        prog="python -m engine.classifier",
        description="Train a small classifier on images; held-out accuracy is stored with it.",
    )
    parser.add_config(ClassifierRunConfig)
    config = from_args(ClassifierRunConfig, parser.parse_args())
    setup_logging()
    run(config)


if __name__ == "__main__":
    exit_on_user_error(main)
