"""The command that trains a small image classifier, a feature extractor for data far from ImageNet:

    python -m engine.classifier --data_path data/train --test_path data/test --output classifier.pt

Any architecture of timm serves. The whole data set is kept in memory as bytes and augmented in batches on the device.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict
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
from util.cli import HelpFormatter, exit_on_user_error
from util.data.images import open_images
from util.data.loading import load_all
from util.dist import resolve_device
from util.errors import UserError
from util.logger import setup_logging

logger = logging.getLogger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.classifier",
        description="Train a small classifier on images; held-out accuracy is stored with it.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--data_path", type=Path, required=True, help="training images: a folder per class, or photos.npz:train")
    add("--test_path", type=Path, required=True, help="held-out images of the same classes, likewise")
    add("--output", type=Path, required=True, help="classifier file to write (.pt)")
    add("--arch", default="test_resnet", help="timm architecture; test_resnet has 0.4M parameters and 96 features")
    add("--img_size", type=int, default=32, help="side of the centre crops, pixels")
    add("--input_size", type=int, help="side the network sees (default: --img_size); larger suits deep networks")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--epochs", type=int, default=ClassifierTrainConfig.epochs)
    add("--batch_size", type=int, default=ClassifierTrainConfig.batch_size)
    add("--lr", type=float, default=ClassifierTrainConfig.lr, help="peak learning rate")
    add("--weight_decay", type=float, default=ClassifierTrainConfig.weight_decay)
    add("--label_smoothing", type=float, default=ClassifierTrainConfig.label_smoothing)
    add("--shift", type=float, default=ClassifierTrainConfig.shift, help="largest random shift, as a share of the side")
    add("--rotate", type=float, default=ClassifierTrainConfig.rotate, help="largest random rotation, degrees")
    add("--scale", type=float, default=ClassifierTrainConfig.scale, help="largest random change of scale, relative")
    add("--flip", action="store_true", help="mirror half of the images")
    add("--seed", type=int, default=ClassifierTrainConfig.seed)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    setup_logging()
    device = resolve_device(args.device)
    train = ClassifierTrainConfig(**{name: getattr(args, name) for name in ClassifierTrainConfig.__dataclass_fields__})
    train_set, test_set = open_images(args.data_path, args.img_size), open_images(args.test_path, args.img_size)
    if train_set.classes != test_set.classes:
        raise UserError(
            f"--test_path {args.test_path} has classes {', '.join(test_set.classes)}; expected those of --data_path, "
            f"{', '.join(train_set.classes)}."
        )
    torch.manual_seed(args.seed)
    model = Classifier(
        ClassifierConfig(args.arch, len(train_set.classes), args.img_size, args.input_size or args.img_size)
    )
    (images, labels), (test_images, test_labels) = (
        (pixels.permute(0, 3, 1, 2).contiguous(), labels) for pixels, labels in map(load_all, (train_set, test_set))
    )
    start = time.perf_counter()
    train_classifier(model, images, labels, train, device)
    metadata: dict[str, Any] = {
        "test_accuracy": accuracy(model, test_images, test_labels, device),
        "train_images": len(images),
        "test_images": len(test_images),
        "train_sec": round(time.perf_counter() - start, 1),
        "device": str(device),
        "train": asdict(train),
    }
    save_classifier(model, tuple(train_set.classes), args.output, metadata)
    logger.info(
        "%s reads %.2f %% of %d held-out images right; trained in %.1f s; written to %s",
        args.arch,
        100 * metadata["test_accuracy"],
        len(test_images),
        metadata["train_sec"],
        args.output,
    )
    print(json.dumps(metadata))


if __name__ == "__main__":
    exit_on_user_error(main)
