"""Train a tokenizer on images: ``python -m tokenizers.train --data_path FOLDER --output_dir DIR ...``.

This is the command; the training itself is :mod:`engine.tokenizer_training`. As a command it stands above ``engine/``,
and is the one module in this folder that imports from there.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.scoring.features import load_feature_extractor
from engine.tokenizer_training.config import TokenizerTrainConfig
from engine.tokenizer_training.data import split
from engine.tokenizer_training.folder import LOG, TOKENIZER
from engine.tokenizer_training.quality import ceiling_warnings, judge
from engine.tokenizer_training.trainer import train_tokenizer
from engine.training.stop import exit_when_told
from tokenizers.checkpoint import load_tokenizer
from tokenizers.vq_model import MULTIPLIERS, VQConfig
from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, part, record, setting
from util.data.classes import ClassChoice
from util.data.images import open_images
from util.data.loading import Images
from util.dist import DeviceConfig, resolve_device
from util.errors import UserError
from util.files import check_output_dir
from util.logger import setup_logging
from util.readers import read_json_lines

log = logging.getLogger(__name__)

# Size of a tokenizer that trains in minutes to hours, where neither flags nor a tokenizer to start from say otherwise.
_SMALL: dict[str, Any] = {"base_width": 64, "codebook_size": 1024}


@dataclass(frozen=True)
class TokenizerCommand(DeviceConfig):
    """What ``python -m tokenizers.train`` does. UserError for settings out of range, or that do not go together."""

    data_path: Path = setting(help="images: one subfolder per class, or photos.npz:train")
    output_dir: Path = setting(help="folder for the results; made if missing")
    tokenizer: VQConfig = part("tokenizer")
    training: TokenizerTrainConfig = part("training")
    test_path: Path | None = setting(None, "images to measure on (default: a part of --data_path is held out)")
    feature_extractor: Path | None = setting(
        None, "classifier of engine.classifier: at the end it says how much of the pictures is lost"
    )
    img_size: int = setting(256, "side of the centre crop, pixels", at_least=1)
    stride: int = setting(16, "pixels per token and side: 1, 2, 4, 8 or 16")
    epochs: int | None = setting(None, "passes over the training images, instead of --steps", at_least=1)
    skip_broken: bool = setting(False, "leave out images that cannot be read")
    choice: ClassChoice = part(default_factory=ClassChoice)

    def __post_init__(self) -> None:
        check(self)
        stride, multipliers = self.stride, self.tokenizer.multipliers
        if self.tokenizer.stride != stride:
            levels = len(MULTIPLIERS[stride])
            raise UserError(f"--multipliers {multipliers} must be {levels} numbers for --stride {stride}.")
        if self.img_size % stride:
            raise UserError(f"--img_size {self.img_size} must be a multiple of --stride {stride}.")
        check_output_dir(self.output_dir)


def _parse() -> TokenizerCommand:
    parser = Parser(
        prog="python -m tokenizers.train",
        description="Train a VQ tokenizer on images; writes tokenizer.pt, metrics.json, metrics.jsonl and "
        "reconstructions.png.",
    )
    defaults = {**_SMALL, "multipliers": None, "steps": None, "num_workers": min(8, os.cpu_count() or 1)}
    parser.add_config(TokenizerCommand, defaults)
    args = parser.parse_args()
    if args.vqgan_path is not None:  # its sizes are the defaults
        start = load_tokenizer(args.vqgan_path).config
        sizes = {name: value for name, value in record(start).items() if value is not None} | {"stride": start.stride}
        parser.set_defaults(**sizes)
        args = parser.parse_args()
        if args.stride != start.stride:
            raise UserError(f"{args.vqgan_path} has stride {start.stride}; leave out --stride to take that.")
    if args.stride not in MULTIPLIERS:
        raise UserError(f"--stride is {args.stride}; choose one of {', '.join(map(str, MULTIPLIERS))}.")
    if (args.steps is None) == (args.epochs is None):
        raise UserError("give either --steps or --epochs.")
    # The number of steps of so many epochs is known when the images have been counted.
    training = from_args(TokenizerTrainConfig, args, steps=1 if args.steps is None else args.steps)
    tokenizer = from_args(VQConfig, args, multipliers=args.multipliers or MULTIPLIERS[args.stride])
    return from_args(TokenizerCommand, args, tokenizer=tokenizer, training=training)


def main() -> None:
    command = _parse()
    setup_logging()
    with exit_when_told():  # outside of the training's steps too: the same command goes on
        metrics = _train(command)
    for sentence in ceiling_warnings(metrics, read_json_lines(command.output_dir / LOG, "step", "psnr_db")):
        log.warning("%s", sentence)
    print(_summary(metrics, command.output_dir / TOKENIZER))


def _train(command: TokenizerCommand) -> dict[str, Any]:
    device, config = resolve_device(command.device), command.training
    extractor = None
    if command.feature_extractor is not None:
        extractor = load_feature_extractor(str(command.feature_extractor), device)
    size, skip = command.img_size, command.skip_broken
    dataset = open_images(command.data_path, size, skip, choice=command.choice)
    test_set = None if command.test_path is None else open_images(command.test_path, size, skip, choice=command.choice)
    train_set: Images
    held_out_set: Images
    train_set, held_out_set = split(dataset, config.held_out, config.seed) if test_set is None else (dataset, test_set)
    if command.epochs is not None:
        config = dataclasses.replace(config, steps=math.ceil(command.epochs * len(train_set) / config.batch_size))
    judging = None
    if extractor is not None:
        same_classes = extractor.classes == tuple((test_set or dataset).classes)
        if not same_classes:
            log.warning("%s has other classes than the images; it can't say how many are read right", extractor.name)
        judging = partial(
            judge, extractor=extractor, train_set=train_set, held_out_set=held_out_set, same_classes=same_classes,
            batch_size=config.batch_size, num_workers=config.num_workers,
        )  # fmt: skip
    log.info("%s, %s on %s", command.tokenizer, config, device)
    torch.backends.cudnn.benchmark = True  # one shape throughout
    return train_tokenizer(dataset, command.tokenizer, config, command.output_dir, device, test_set, judging)


def _summary(metrics: dict[str, Any], path: Path) -> str:
    size, images = metrics["tokenizer"]["codebook_size"], metrics["held_out_images"]
    text = (
        f"{path}: PSNR {metrics['psnr_db']:.2f} dB, SSIM {metrics['ssim']:.3f} on {images} held-out images, "
        f"{metrics['codebook_share']:.1%} of {size} codes in use (perplexity {metrics['codebook_perplexity']:.1f})"
    )
    if "frechet_distance_real" in metrics:
        text += (
            f"; Fréchet distance to the training images {metrics['frechet_distance_reconstructed']:.2f} "
            f"(the images themselves: {metrics['frechet_distance_real']:.2f})"
        )
    if "class_accuracy_real" in metrics:
        text += (
            f"; read as their class {metrics['class_accuracy_reconstructed']:.1%} "
            f"(the images themselves: {metrics['class_accuracy_real']:.1%})"
        )
    return f"{text}; {metrics['train_sec']:.0f} s"


if __name__ == "__main__":
    exit_on_user_error(main)
