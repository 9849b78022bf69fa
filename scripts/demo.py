"""The demo: every part of the project on small digits, for two CPU cores. Run it by `bash scripts/demo.sh`.

Each stage is an ordinary command of the project, printed before it runs. At the end several generation orders are
scored with one model and the pictures drawn.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from engine.evaluation.config import EvalConfig
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import open_inputs
from engine.metrics import extract
from engine.scoring.config import ScoringConfig
from engine.scoring.features import load_feature_extractor
from engine.scoring.metrics import score
from engine.scoring.statistics import load_reference_statistics
from models.lpd import LPD, LPDConfig, load_weights
from models.sampling import Sampling
from orders.config import OrderConfig
from scripts.digits import IMG_SIZE
from scripts.stages import Clock, Stages
from tokenizers import load_tokenizer
from util.checkpoint import LAST, load_checkpoint
from util.cli import Parser, exit_on_user_error
from util.data.images import ImageFolder
from util.dist import Dist, resolve_device
from util.errors import UserError
from util.files import check_output_dir
from util.logger import setup_logging
from util.plots import plot_loss

STRIDE = 4
CFG = 4.0
NUM_IMAGES = 400
ROWS = (("raster", 64), ("random", 64), ("random", 16), ("random", 8), ("lpd", 64), ("lpd", 16), ("lpd", 8))
ORDER_NAMES = {"raster": "raster, one by one", "random": "random", "lpd": "locality-aware"}


# Flags for small pictures and two cores; the others keep their defaults.
TOKENIZER_FLAGS = (
    "--base_width", "8", "--res_blocks", "1", "--z_channels", "32", "--codebook_size", "64", "--code_dim", "3",
    "--steps", "300", "--batch_size", "16", "--lr", "4e-3", "--num_workers", "0",
)  # fmt: skip
LPD_FLAGS = (
    "--model", "lpd_tiny", "--epochs", "13", "--batch_size", "64", "--lr", "2e-3", "--lr_schedule", "cosine",
    "--warmup_epochs", "2", "--proj_dropout", "0", "--flip_prob", "0", "--num_workers", "0", "--no-compile",
    "--log_freq", "10",
)  # fmt: skip
# The last of a repeated flag wins.
QUICK = {
    "tokenizer": ("--steps", "10"),
    "LPD": ("--epochs", "1", "--warmup_epochs", "0"),
    "digit classifier": ("--epochs", "1"),
}


def run_stages(stages: Stages, out: Path, device: str, quick: bool) -> None:
    """The commands that make what the comparison needs."""
    tokenizer, codes, classifier = out / "tokenizer" / "tokenizer.pt", out / "codes", out / "classifier.pt"
    train, test = out / "digits" / "train", out / "digits" / "test"
    common = ("--img_size", str(IMG_SIZE), "--device", device)

    def run(title: str, *words: str | Path) -> None:
        stages.command(title, *words, *(QUICK.get(title, ()) if quick else ()))

    run("digits", "-m", "scripts.digits", out / "digits")
    run(
        "tokenizer", "-m", "tokenizers.train", "--data_path", train, "--output_dir", tokenizer.parent,
        *common, "--stride", str(STRIDE), *TOKENIZER_FLAGS,
    )  # fmt: skip
    run(
        "codes", "main_cache.py", "--data_path", train, "--vqgan_path", tokenizer, "--cached_path", codes,
        *common, "--num_workers", "0",
    )  # fmt: skip
    run(
        "LPD", "main_lpd.py", "--use_cached", "--cached_path", codes, "--vqgan_path", tokenizer,
        "--output_dir", out / "lpd", *common, *LPD_FLAGS,
    )  # fmt: skip
    run(
        "digit classifier", "-m", "engine.classifier", "--data_path", train, "--test_path", test,
        "--output", classifier, *common,
    )  # fmt: skip
    run(
        "reference statistics", "-m", "engine.metrics", "--data_path", train, "--feature_extractor", classifier,
        "--output", out / "reference.npz", *common,
    )  # fmt: skip
    run(
        "picture of the orders", "-m", "orders", "compare", out / "orders.png",
        "--orders", "raster", "random", "lpd", "--grid", str(IMG_SIZE // STRIDE), "--steps", "16",
    )  # fmt: skip


class Comparison:
    """One model, several generation orders: the table and the pictures."""

    def __init__(self, out: Path, dist: Dist, num_images: int) -> None:
        self.out, self.dist, self.num_images = out, dist, num_images
        checkpoint = load_checkpoint(out / "lpd" / LAST)
        self.model = LPD(LPDConfig(**checkpoint["config"]))
        load_weights(self.model, checkpoint["model"], "the demo's checkpoint")
        self.model.to(dist.device).eval()
        self.classes = tuple(checkpoint["classes"])
        self.tokenizer = load_tokenizer(out / "tokenizer" / "tokenizer.pt", dist.device)
        self.extractor = load_feature_extractor(str(out / "classifier.pt"), dist.device)
        self.test_digits = ImageFolder(out / "digits" / "test", IMG_SIZE)

    def generated(self, order: str, steps: int) -> dict[str, float]:
        """Scores of one order and number of steps; results and pictures go to `eval/<order>_<steps>`."""
        config = EvalConfig(
            output_dir=self.out / "eval" / f"{order}_{steps}",
            num_images=self.num_images,
            eval_bsz=self.num_images // 5,
            decode_path="plain",  # so small a model is decoded before anything is compiled
            orders=OrderConfig(order=order, generation_steps=steps),
            sampling=Sampling(cfg=CFG),
            scoring=ScoringConfig(
                feature_extractor=str(self.out / "classifier.pt"), reference_statistics=self.out / "reference.npz"
            ),
        )
        inputs = open_inputs(config, self.model.config, self.dist, self.classes, self.extractor)
        return evaluate(self.model, self.tokenizer, config, inputs, self.dist)

    def real(self, reconstructed: bool) -> dict[str, float]:
        """The floor: scores of the held-out digits themselves, or of what the tokenizer makes of them."""
        tokenizer = self.tokenizer if reconstructed else None
        statistics, logits = extract(self.test_digits, self.extractor, tokenizer, len(self.test_digits))
        labels = torch.from_numpy(self.test_digits.labels)
        scores = score(statistics, logits, load_reference_statistics(self.out / "reference.npz"), self.extractor.name)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return {"class_accuracy": accuracy, "frechet_distance": scores["frechet_distance"]}

    def table(self) -> str:
        """The table as Markdown."""
        lines = [
            "| digits | decoding steps | read as the class asked for | Fréchet distance | seconds per image |",
            "|---|---|---|---|---|",
        ]

        def add(name: str, steps: str, scores: dict[str, float]) -> None:
            seconds = f"{scores['sec_per_image']:.4f}" if scores.get("sec_per_image") else "–"
            accuracy, distance = scores["class_accuracy"], scores["frechet_distance"]
            lines.append(f"| {name} | {steps} | {accuracy:.1%} | {distance:.2f} | {seconds} |")

        for order, steps in ROWS:
            add(ORDER_NAMES[order], str(steps), self.generated(order, steps))
        add("real, held out", "–", self.real(reconstructed=False))
        add("real, held out, through the tokenizer", "–", self.real(reconstructed=True))
        return "\n".join(lines)


def conditions(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    parser = Parser(prog="bash scripts/demo.sh", description="The whole path on handwritten digits.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder of everything that is made")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="only see that everything runs; the scores mean nothing")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    args = parser.parse_args()
    device = resolve_device(args.device)
    out = args.output_dir
    check_output_dir(out)
    if out.exists() and any(out.iterdir()) and not (out / "stages").exists():
        raise UserError(f"--output_dir {out} holds something else than a demo; name a new or empty folder.")
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    (out / "stages").mkdir(parents=True, exist_ok=True)
    setup_logging()
    start = time.perf_counter()
    run_stages(Stages(out, Clock()), out, args.device, args.quick)
    num_images = 20 if args.quick else NUM_IMAGES
    comparison = Comparison(out, Dist(0, 1, device), num_images)
    print(f"\n== generation orders compared: {num_images} digits each, guidance {CFG:g}", flush=True)
    table = comparison.table()
    shutil.copy(out / "eval" / "lpd_16" / "grid.png", out / "samples.png")
    lines = [json.loads(line) for line in (out / "lpd" / "metrics.jsonl").read_text().splitlines()]
    plot_loss(lines, out / "loss.png", comparison.model.config.vocab_size)
    text = f"{table}\n\n{num_images} digits per row, guidance {CFG:g}; {conditions(device)}.\n"
    (out / "results.md").write_text(text)
    pictures = ", ".join(str(out / f"{name}.png") for name in ("samples", "orders", "loss"))
    print(f"\n{text}\nTable: {out / 'results.md'}\nPictures: {pictures}")
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
