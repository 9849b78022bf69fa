"""The demo: every part of the project on small digits, for two CPU cores. Run it by `bash scripts/demo.sh`.

Nearly each stage is an ordinary command of the project, printed before it runs. At the end several generation orders
are compared with one model, by what it generates and by how likely it finds held-out digits, and the pictures drawn.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.evaluation.compare import Comparison
from engine.evaluation.config import EvalConfig
from engine.image_generator import ImageGenerator
from engine.scoring.config import ScoringConfig
from engine.training.stop import exit_when_told
from models.sampling import Sampling
from scripts.plots import plot_losses
from scripts.stages import OutOfTime, Stages, train_and_judge
from util.checkpoint import LAST
from util.cli import Parser, exit_on_user_error
from util.dist import DeviceConfig, Dist, resolve_device
from util.errors import UserError, reading
from util.files import atomic_write, check_output_dir, write_json
from util.folder_lock import LOCK_FILE, FolderLock
from util.logger import setup_logging
from util.readers import read_json
from util.signals import REQUEUE_STATUS

IMG_SIZE, STRIDE, CODES = 32, 4, 64
CFG = 4.0
ROWS = (("raster", 64), ("random", 64), ("random", 16), ("random", 8), ("lpd", 64), ("lpd", 16), ("lpd", 8))
NAMES = {
    "raster": "raster, one by one",
    "random": "random",
    "lpd": "locality-aware",
    "real": "real, held out",
    "reconstructed": "real, held out, through the tokenizer",
}

# Flags for small pictures and two cores; the others keep their defaults.
FLAGS: dict[str, tuple[str, ...]] = {
    "tokenizer": (
        "--stride", str(STRIDE), "--base_width", "8", "--res_blocks", "1", "--z_channels", "32",
        "--codebook_size", str(CODES), "--code_dim", "3", "--steps", "300", "--batch_size", "16", "--lr", "4e-3",
        "--ema", "0", "--num_workers", "0",
    ),
    "codes": ("--num_workers", "0"),
    "lpd": (
        "--model", "lpd_tiny", "--epochs", "13", "--batch_size", "64", "--lr", "2e-3", "--lr_schedule", "cosine",
        "--warmup_epochs", "2", "--proj_dropout", "0", "--flip_prob", "0", "--num_workers", "0", "--no-compile",
        "--log_freq", "10",
    ),
    "likelihood": ("--orders", "lpd", "random", "raster", "--steps", "64", "16", "8"),
}  # fmt: skip
# The last of a repeated flag wins.
QUICK = {
    "tokenizer": ("--steps", "10"),
    "lpd": ("--epochs", "1", "--warmup_epochs", "0"),
    "classifier": ("--epochs", "1"),
    "likelihood": ("--num_images", "40"),
}


def write_digits(folder: Path) -> None:
    """Write scikit-learn's handwritten digits as `folder/{train,test}/<digit>/<number>.png`, RGB, 32×32.

    These are 1,797 scans of 8×8 pixels in 17 grey levels (Alpaydin & Kaynak, UCI Optical Recognition of Handwritten
    Digits), enlarged; every fifth scan of a digit is test.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = dict.fromkeys(range(10), 0)
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        seen[digit] += 1
        split = "test" if seen[digit] % 5 == 0 else "train"
        grey = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))
        path = folder / split / str(digit) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path)


def run_stages(stages: Stages, out: Path, device: str, quick: bool) -> None:
    """Everything that the comparison needs."""
    stages.run("digits", partial(write_digits, out / "digits"), "the digits of scikit-learn")
    train, test = (str(out / "digits" / split) for split in ("train", "test"))
    common = ("--img_size", str(IMG_SIZE), "--device", device)
    more = QUICK if quick else {}
    flags = {stage: (*FLAGS.get(stage, ()), *more.get(stage, ())) for stage in (*FLAGS, *more)}
    train_and_judge(stages, out, train, test, train, common, flags)
    files = ("--pretrained_ckpt", out / "lpd" / LAST, "--vqgan_path", out / "tokenizer" / "tokenizer.pt")
    stages.command(
        "likelihood", "-m", "scripts.likelihood", *files, "--data_path", test, "--output_dir", out / "likelihood",
        "--device", device, *flags["likelihood"], output=out / "likelihood.txt",
    )  # fmt: skip
    stages.command(
        "picture of the orders", "-m", "orders", "compare", out / "orders.png",
        "--orders", "raster", "random", "lpd", "--grid", str(IMG_SIZE // STRIDE), "--steps", "16",
    )  # fmt: skip


def compare_orders(out: Path, device: torch.device, num_images: int) -> str:
    """A Markdown table: one model, several generation orders; results and pictures go to `eval/<order>_<steps>`."""
    dist, classifier = Dist(0, 1, device), str(out / "classifier.pt")
    trained = ImageGenerator(out / "lpd" / LAST, out / "tokenizer" / "tokenizer.pt", device=str(device))
    scoring = ScoringConfig(feature_extractor=classifier, reference_statistics=out / "reference.npz")
    lines = [
        "| digits | decoding steps | read as the class asked for | Fréchet distance | seconds per image |",
        "|---|---|---|---|---|",
    ]

    def add(name: str, steps: object, scores: dict[str, Any]) -> None:
        seconds = f"{scores['sec_per_image']:.4f}" if scores.get("sec_per_image") else "–"
        accuracy, distance = scores["class_accuracy"], scores["frechet_distance"]
        lines.append(f"| {NAMES[name]} | {steps} | {accuracy:.1%} | {distance:.2f} | {seconds} |")

    config = EvalConfig(
        output_dir=out / "eval",
        num_images=num_images,
        eval_bsz=num_images // 5,
        decode_path="plain",  # so small a model is decoded before anything is compiled
        sampling=Sampling(cfg=CFG),
        scoring=scoring,
    )
    comparison = Comparison(trained, config, dist, {"ema": False, **trained.files()})
    for order, steps in ROWS:
        add(order, steps, comparison.results(order, steps))
    for floor in ("real", "reconstructed"):
        path = out / "floors" / f"reference_{floor}.json"
        with reading("scores", path):
            add(floor, "–", read_json("scores", path))
    return "\n".join(lines)


def conditions(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    parser = Parser(prog="bash scripts/demo.sh", description="The whole path on handwritten digits.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder of everything that is made")
    parser.add_config(DeviceConfig)
    parser.add_argument("--quick", action="store_true", help="only see that everything runs; the scores mean nothing")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    args = parser.parse_args()
    device, out, stages = resolve_device(args.device), args.output_dir, Stages(args.output_dir)
    check_output_dir(out)
    with FolderLock(out) as lock:
        lock.acquire()
        others = [path for path in out.iterdir() if path.name != LOCK_FILE]
        if others and not stages.path.exists():
            raise UserError(f"--output_dir {out} holds something else than a demo; name a new or empty folder.")
        if args.fresh:
            # First of all and not deleted: one that is killed here leaves a demo of which nothing is finished.
            write_json(stages.path, {})
            for path in others:
                if path != stages.path:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        setup_logging()
        start = time.perf_counter()
        with exit_when_told():
            try:
                run_stages(stages, out, args.device, args.quick)
            except OutOfTime as reason:
                print(f"\n{reason}; run the same command again to resume.", flush=True)
                raise SystemExit(REQUEUE_STATUS) from None
            write_results(out, device, 20 if args.quick else 400)
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)


def write_results(out: Path, device: torch.device, num_images: int) -> None:
    """The comparison, and what it and the stages found on one page, with its pictures."""
    print(f"\n== generation orders compared: {num_images} digits each, guidance {CFG:g}", flush=True)
    table = compare_orders(out, device, num_images)
    shutil.copy(out / "eval" / "lpd_16" / "grid.png", out / "samples.png")
    plot_losses(out / "loss.png", [out / "lpd"])
    text = f"{table}\n\n{num_images} digits per row, guidance {CFG:g}; {conditions(device)}.\n"
    text += f"\nHow likely the model finds the held-out digits:\n\n{(out / 'likelihood' / 'table.md').read_text()}"
    with atomic_write(out / "results.md") as file:
        file.write(text.encode())
    pictures = ", ".join(str(out / f"{name}.png") for name in ("samples", "orders", "loss"))
    print(f"\n{text}\nTable: {out / 'results.md'}\nPictures: {pictures}")


if __name__ == "__main__":
    exit_on_user_error(main)
