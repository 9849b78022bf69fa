"""The command that trains a small image classifier, a feature extractor for data far from ImageNet:

    python -m engine.classifier --data_path data/train --test_path data/test --output classifier.pt

The same command again resumes a training that was stopped.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.scoring.classifier import Classifier, ClassifierConfig, accuracy, save_classifier
from engine.scoring.classifier_training import ClassifierTrainConfig, ClassifierTraining, check_same
from util.checkpoint import load_checkpoint
from util.cli import Parser, exit_on_user_error, from_args
from util.config import part, record, setting
from util.data.classes import ClassChoice
from util.data.images import open_images
from util.data.loading import load_all
from util.dist import DeviceConfig, resolve_device
from util.errors import UserError
from util.files import check_output_file
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
    """Train, measure on the held-out images, write the classifier and print what is recorded with it as JSON.

    The same call resumes a training that was stopped, from the file beside the output; a finished one is left alone.
    """
    check_output_file(config.output)
    device = resolve_device(config.device)
    train_set, test_set = (
        open_images(path, config.img_size, choice=config.choice) for path in (config.data_path, config.test_path)
    )
    if train_set.classes != test_set.classes:
        raise UserError(f"--test_path has classes {', '.join(test_set.classes)}, which are not those of --data_path.")
    input_size = config.input_size or config.img_size
    described = {"arch": config.arch, "img_size": config.img_size, "input_size": input_size, **record(config.train)}
    described |= {"training images": train_set.fingerprint(), "test images": test_set.fingerprint()}
    if config.output.exists():
        metadata = load_checkpoint(config.output).get("metadata") or {}
        check_same(metadata.get("described") or metadata.get("train", {}), described, config.output)
        logger.info("the training is finished: %s is there", config.output)
        print(json.dumps(metadata))
        return
    torch.manual_seed(config.train.seed)
    model = Classifier(ClassifierConfig(config.arch, len(train_set.classes), config.img_size, input_size))
    (images, labels), (test_images, test_labels) = load_all(train_set), load_all(test_set)
    images, test_images = (pixels.permute(0, 3, 1, 2).contiguous() for pixels in (images, test_images))

    state = config.output.with_name(f"{config.output.name}.state.pth")
    training = ClassifierTraining(model, images, labels, config.train, device, state, described)
    start, steps = time.perf_counter(), training.total_steps - training.done
    try:
        training.run()
        test_accuracy = accuracy(model, test_images, test_labels, device)
    except FloatingPointError:
        state.unlink(missing_ok=True)  # it would diverge again
        raise
    metadata = {
        "test_accuracy": test_accuracy,
        "train_images": len(images),
        "test_images": len(test_images),
        # Of a resumed training only the last part was timed.
        "train_sec": round(time.perf_counter() - start, 1) if steps == training.total_steps else None,
        "device": str(device),
        "train": record(config.train),
        "described": described,
    }
    save_classifier(model, tuple(train_set.classes), config.output, metadata)
    state.unlink(missing_ok=True)
    share = 100 * metadata["test_accuracy"]
    logger.info("%s: reads %.2f %% of %d held-out images right", config.output, share, len(test_images))
    print(json.dumps(metadata))


def main() -> None:
    parser = Parser(
        prog="python -m engine.classifier",
        description="Train a small classifier on images; held-out accuracy is stored with it. The same command again "
        "resumes a training that was stopped.",
    )
    parser.add_config(ClassifierRunConfig)
    config = from_args(ClassifierRunConfig, parser.parse_args())
    setup_logging()
    run(config)


if __name__ == "__main__":
    exit_on_user_error(main)
