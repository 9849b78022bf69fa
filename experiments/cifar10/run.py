"""Does it hold on real photographs? Trains everything from scratch on 32×32 photos and compares generation orders.

    python -m experiments.cifar10.run --data photos.npz --output_dir runs/cifar10

Every stage is an ordinary command of the project, printed before it runs. What is finished is not done again: after an
interruption, or when --time_limit has ended a call, the same command resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from pathlib import Path

import numpy as np

from engine.scoring.features import INCEPTION
from experiments.cifar10.report import write_report
from experiments.cifar10.scales import FULL, IMG_SIZE, STRIDE, TINY, Scale
from experiments.cifar10.sweep import Sweep, plan
from models import model_config
from models.flops import training_flops
from scripts.stages import Clock, OutOfTime, Stages
from util.cli import Parser, exit_on_user_error
from util.data.images import CIFAR10_FOLDER, open_images, write_image_archive
from util.dist import Dist, resolve_device
from util.errors import UserError
from util.files import check_output_dir
from util.logger import setup_logging
from util.signals import REQUEUE_STATUS

STAGES = ("tokenizer", "codes", "classifier", "reference", "floors", "lpd", "sweep", "report")
OUT_OF_TIME = REQUEUE_STATUS  # exit status: not finished, run the same command again


def split_paths(data: Path) -> tuple[str, str]:
    """Training and test images of what --data names, as every command's --data_path takes them."""
    if data.suffix == ".npz" or data.name == CIFAR10_FOLDER:
        return f"{data}:train", f"{data}:test"
    return str(data / "train"), str(data / "test")


def download_cifar10(folder: Path) -> None:
    """torchvision's CIFAR-10 into the folder that holds ``cifar-10-batches-py``, unless it is there."""
    from torchvision.datasets import CIFAR10

    CIFAR10(folder.parent, download=True)


def write_subset(train: str, test: str, count: int, path: Path) -> None:
    """``count`` photos of each split, evenly spread over the split, as an image archive."""
    files, labels, numbers = [], [], []
    classes: list[str] = []
    for number, source in enumerate((train, test)):
        images = open_images(source, IMG_SIZE)
        classes = images.classes
        for index in np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist():
            file = io.BytesIO()
            images.read(index).save(file, "PNG")
            files.append(file.getvalue())
            labels.append(int(images.labels[index]))
            numbers.append(number)
    write_image_archive(path, files, labels, classes, numbers)


class Experiment:
    """The stages, a method each, in the order of STAGES."""

    def __init__(self, out: Path, data: Path, scale: Scale, device: str, inception: Path | None, clock: Clock) -> None:
        self.out, self.scale, self.inception, self.clock = out, scale, inception, clock
        self.stages = Stages(out, clock)
        self.dist = Dist(0, 1, resolve_device(device))
        self.train, self.test = split_paths(data)
        self.common = ("--img_size", str(IMG_SIZE), "--device", device)
        self.bf16 = ("--bf16",) if self.dist.device.type == "cuda" else ()
        self.tokenizer_path, self.classifier_path = out / "tokenizer" / "tokenizer.pt", out / "classifier.pt"

    def check_epochs(self) -> None:
        """Raise UserError if the folder's LPD was trained for another number of epochs than the report would say."""
        path = self.out / "lpd" / "checkpoint-last.json"
        if not path.exists():
            return
        trained, wanted = json.loads(path.read_text())["args"]["epochs"], lpd_flags(self.scale)["--epochs"]
        if trained != int(wanted):
            raise UserError(
                f"{self.out} holds an LPD trained with --epochs {trained}, not {wanted}; resume with {trained} or give "
                "another --output_dir."
            )

    def use_subset(self) -> None:
        """Replace the photos by a few of them, where the scale says so."""
        if self.scale.subset is None:
            return
        path = self.out / f"subset{self.scale.subset}.npz"
        if not path.exists():
            write_subset(self.train, self.test, self.scale.subset, path)
        self.train, self.test = split_paths(path)

    def tokenizer(self) -> None:
        self.stages.command(
            "tokenizer", "-m", "tokenizers.train", "--data_path", self.train, "--test_path", self.test,
            "--output_dir", self.tokenizer_path.parent, "--stride", str(STRIDE), *self.common, *self.bf16,
            *self.scale.tokenizer, stoppable=True,
        )  # fmt: skip

    def codes(self) -> None:
        self.stages.command(
            "codes", "main_cache.py", "--data_path", self.train, "--vqgan_path", self.tokenizer_path,
            "--cached_path", self.out / "codes", *self.common, *self.scale.codes, stoppable=True,
        )  # fmt: skip

    def classifier(self) -> None:
        self.stages.command(
            "classifier", "-m", "engine.classifier", "--data_path", self.train, "--test_path", self.test,
            "--output", self.classifier_path, *self.common, *self.scale.classifier,
        )  # fmt: skip

    def _extractors(self) -> dict[str, tuple[str | Path, ...]]:
        """By the name of their statistics: the flags of the classifier and, with its weights, of Inception."""
        extractors: dict[str, tuple[str | Path, ...]] = {"reference": ("--feature_extractor", self.classifier_path)}
        if self.inception is not None:
            extractors["inception"] = ("--feature_extractor", INCEPTION, "--inception_path", self.inception)
        return extractors

    def _metrics(self, name: str, *words: str | Path, output: Path | None = None) -> None:
        self.stages.command(name, "-m", "engine.metrics", *words, "--batch_size", "250", *self.common, output=output)

    def reference(self) -> None:
        for name, flags in self._extractors().items():
            output = ("--output", self.out / f"{name}.npz")
            self._metrics(f"{name} statistics", "--data_path", self.test, *output, *flags)

    def floors(self) -> None:
        """What is possible: other real photos, and the same photos through the tokenizer."""
        floors: dict[str, tuple[str | Path, ...]] = {
            "train": ("--data_path", self.train),
            "reconstructed": ("--data_path", self.test, "--vqgan_path", self.tokenizer_path),
        }
        for name, flags in self._extractors().items():
            scored = ("--reference_statistics", self.out / f"{name}.npz")
            for floor, photos in floors.items():
                output = self.out / "floors" / f"{name}_{floor}.json"
                self._metrics(f"floor {name} {floor}", *photos, *scored, *flags, output=output)

    def lpd(self) -> None:
        self.stages.command(
            "lpd", "main_lpd.py", "--use_cached", "--cached_path", self.out / "codes", "--vqgan_path",
            self.tokenizer_path, "--output_dir", self.out / "lpd", *self.common, *self.bf16, *self.scale.lpd,
            stoppable=True,
        )  # fmt: skip

    def sweep(self) -> None:
        def action() -> None:
            Sweep(self.out, self.scale, self.dist, self.inception).run(self.clock)

        self.stages.run("sweep", action, "the cells of experiments/cifar10/sweep.py", always=True)

    def report(self) -> None:
        write_report(self.out, self.scale, self.stages.seconds(), (self.train, self.test))


def lpd_flags(scale: Scale) -> dict[str, str]:
    """The flags of the LPD training, all of which take a value; the last one counts."""
    return dict(zip(scale.lpd[::2], scale.lpd[1::2], strict=True))


def print_plan(scale: Scale, fid: bool) -> None:
    """The work to come, in cells and in floating point operations."""
    flags = lpd_flags(scale)
    name, epochs = flags["--model"], int(flags["--epochs"])
    model = model_config(name, img_size=IMG_SIZE, stride=STRIDE, class_num=10, vocab_size=1024)
    pflop = epochs * 50_000 * training_flops(model) / 1e15
    print(f"training: {name}, {epochs} epochs of 50,000 photos, {pflop:.0f} PFLOP")
    for kind, cells, images, pflop in plan(scale, model, fid):
        print(f"{kind}: {cells} cells, {images:,} images, {pflop:.0f} PFLOP")


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.cifar10.run", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="photos.npz with both splits, a folder with train/ and test/, or "
        f"torchvision's {CIFAR10_FOLDER}")  # fmt: skip
    add("--download", action="store_true", help=f"let torchvision download --data, a folder named {CIFAR10_FOLDER}")
    add("--output_dir", type=Path, default=Path("runs/cifar10"), help="everything that is made")
    add("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="only these stages")
    add("--time_limit", type=float, help="seconds after which no stage or cell is begun, and training saves and stops")
    add("--tiny", action="store_true", help="a few photos and tiny models: only see that everything runs")
    add("--epochs", type=int, help="of the LPD training, for a faster or slower machine (default: "
        f"{lpd_flags(FULL)['--epochs']}, with --tiny {lpd_flags(TINY)['--epochs']})")  # fmt: skip
    add("--inception_path", type=Path, help="Inception weights: FID as well, for one seed (doubles the table's time)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--plan", action="store_true", help="print how much work it is and stop")
    return parser.parse_args()


def prepare(args: argparse.Namespace, scale: Scale) -> Experiment:
    """Check everything that the flags name, then make the output folder."""
    if args.time_limit is not None and args.time_limit <= 0:
        raise UserError(f"--time_limit {args.time_limit} must be positive.")
    if args.inception_path is not None and not args.inception_path.is_file():
        raise UserError(f"--inception_path {args.inception_path} does not exist.")
    if args.download:
        if args.data.name != CIFAR10_FOLDER:
            raise UserError(f"--download needs --data to end in {CIFAR10_FOLDER}, not {args.data}.")
        download_cifar10(args.data)
    check_output_dir(args.output_dir)
    clock = Clock(args.time_limit)
    experiment = Experiment(args.output_dir, args.data, scale, args.device, args.inception_path, clock)
    experiment.check_epochs()
    for path in split_paths(args.data):
        open_images(path, IMG_SIZE)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    experiment.use_subset()
    return experiment


def main() -> None:
    args = parse()
    scale = TINY if args.tiny else FULL
    if args.epochs is not None:
        scale = dataclasses.replace(scale, lpd=(*scale.lpd, "--epochs", str(args.epochs)))
    if args.plan:
        return print_plan(scale, args.inception_path is not None)
    setup_logging()
    experiment = prepare(args, scale)
    try:
        for stage in STAGES:
            if stage in args.stage:
                getattr(experiment, stage)()
    except OutOfTime as reason:
        print(f"\n{reason}; run the same command again to resume.", flush=True)
        raise SystemExit(OUT_OF_TIME) from None


if __name__ == "__main__":
    exit_on_user_error(main)
