"""The command that computes feature statistics of images, to score against them later, or scores images:

    python -m engine.metrics --data_path data/train --img_size 32 --feature_extractor classifier.pt --output ref.npz
    python -m engine.metrics --data_path samples --img_size 256 --reference_statistics adm_in256_stats.npz

With ``--vqgan_path`` it scores what a tokenizer makes of the images: the floor of all that is generated with it.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from engine.scoring.features import INCEPTION, load_feature_extractor
from engine.scoring.metrics import (
    FeatureStatistics,
    load_reference_statistics,
    reconstruct,
    save_reference_statistics,
    score,
)
from tokenizers import load_tokenizer
from util.cli import HelpFormatter, exit_on_user_error
from util.data.images import open_images
from util.data.loading import image_batches
from util.dist import resolve_device
from util.errors import UserError
from util.files import sha256
from util.logger import setup_logging

logger = logging.getLogger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.metrics",
        description="Feature statistics of images (--output), or their scores (--reference_statistics).",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--data_path", type=Path, required=True, help="folder of images, in subfolders or not, or photos.npz:test")
    add("--img_size", type=int, required=True, help="side of the centre crops, pixels: the size that is generated")
    add("--vqgan_path", type=Path, help="score what this tokenizer makes of the images")
    add("--feature_extractor", default=INCEPTION, help=f"{INCEPTION}, or a file of python -m engine.classifier")
    add("--inception_path", type=Path, help="Inception weights (default: torch's hub cache, downloaded if missing)")
    add("--output", type=Path, help="write the statistics to this npz")
    add("--reference_statistics", type=Path, help="score the images against this npz and print the figures as JSON")
    add("--batch_size", type=int, default=64)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    setup_logging()
    if args.output is None and args.reference_statistics is None:
        raise UserError("nothing to do: give --output to save statistics, --reference_statistics to score, or both.")
    for name in ("img_size", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be positive.")
    reference = load_reference_statistics(args.reference_statistics) if args.reference_statistics else None
    images = open_images(args.data_path, args.img_size, labelled=False)
    device = resolve_device(args.device)
    extractor = load_feature_extractor(args.feature_extractor, device, args.inception_path)
    if reference is not None:
        reference.check(extractor, args.img_size)
    tokenizer = None if args.vqgan_path is None else load_tokenizer(args.vqgan_path, device)
    statistics = FeatureStatistics(extractor.feature_dim, device)
    all_logits = []
    with tqdm(total=len(images), desc=f"features of {images.source}", unit="image") as progress:
        for pixels in image_batches(images, args.batch_size):
            batch = pixels.permute(0, 3, 1, 2)
            features, logits = extractor(batch if tokenizer is None else reconstruct(tokenizer, batch))
            statistics.update(features)
            all_logits.append(logits.cpu())
            progress.update(len(batch))
    metadata = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.weights_hash,
        "num_images": len(images),
        "img_size": args.img_size,
        "data_path": str(args.data_path),
    }
    if args.vqgan_path is not None:
        metadata["tokenizer_sha256"] = sha256(args.vqgan_path)
    if args.output is not None:
        save_reference_statistics(args.output, statistics, metadata)
        logger.info("statistics of %d images written to %s", len(images), args.output)
    if reference is not None:
        source = {"reference_statistics": str(reference.path), "reference_sha256": reference.sha256}
        scores = score(statistics, torch.cat(all_logits), reference, extractor.name)
        if extractor.classes == tuple(images.classes):
            right = torch.cat(all_logits).argmax(1) == torch.from_numpy(images.labels)
            scores["class_accuracy"] = right.double().mean().item()
        print(json.dumps(metadata | source | scores))


if __name__ == "__main__":
    exit_on_user_error(main)
