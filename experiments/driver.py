"""The command of an experiment: stage after stage, each resumable, in one call or in several."""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.training.stop import exit_when_told
from experiments.cells import Scale, plan
from experiments.pages import PICTURES
from experiments.reports import Report, collect
from experiments.sweep import run_sweep
from models import model_config
from models.flops import training_flops
from scripts.stages import TRAINING_STAGES, OutOfTime, Stages, train_and_judge
from util.cli import Parser
from util.config import setting
from util.data.images import CIFAR10_FOLDER, SPLITS, ImageFiles, open_images, write_image_archive
from util.dist import DeviceConfig, Dist, resolve_device
from util.errors import UserError, reading
from util.files import check_output_dir, sha256, write_json
from util.folder_lock import FolderLock
from util.logger import setup_logging
from util.readers import read_json
from util.signals import REQUEUE_STATUS

OUT_OF_TIME = REQUEUE_STATUS  # exit status: not finished, run the same command again


@dataclass(frozen=True)
class RunConfig(DeviceConfig):
    """How long a call of an experiment may take, and where it runs."""

    time_limit: float | None = setting(
        None, "seconds after which no stage or cell is begun, and training saves and stops", above=0
    )


@dataclass(frozen=True)
class Call:
    """What a stage of an experiment's own works with."""

    out: Path
    scale: Scale
    dist: Dist
    stages: Stages
    splits: tuple[str, str]  # training and test images, as every command's --data_path takes them


@dataclass(frozen=True)
class Experiment:
    """An experiment on photographs.

    Args:
        scales: by name, "full" among them.
        about: what ``--help`` says. ``classes``, ``photos``: of the data, for ``--plan``.
        more_stages: by name, what comes between the sweep and the report; they run their steps by ``call.stages``.
        more_results: gives what they measured, and puts their pictures into a folder.
        prepare: called with the output folder and both splits, gives the images to train on, to test with and to take
            statistics of; by default the splits, and the test images again.
        validation: whether the loss on the test images is measured during training.
    """

    report: Report
    scales: Mapping[str, Scale]
    about: str
    classes: int
    photos: int
    more_stages: Mapping[str, Callable[[Call], None]] = field(default_factory=dict)
    more_results: Callable[[Call, Path], dict[str, Any]] | None = None
    prepare: Callable[[Path, tuple[str, str], Scale], tuple[str, str, str]] | None = None
    validation: bool = False

    @property
    def name(self) -> str:
        return self.report.name

    @property
    def stages(self) -> tuple[str, ...]:
        return (*TRAINING_STAGES, "sweep", *self.more_stages, "report")

    def main(self) -> None:
        args = self.parse()
        scale = self.scales[args.scale]
        if args.epochs is not None:
            scale = scale.for_epochs(args.epochs)
        if args.plan:
            return self._print_plan(scale, args.inception_path is not None)
        setup_logging()
        check_output_dir(args.output_dir)
        try:
            with FolderLock(args.output_dir) as lock, exit_when_told():
                lock.acquire()
                self._run_stages(args, scale)
        except OutOfTime as reason:
            print(f"\n{reason}; run the same command again to resume.", flush=True)
            raise SystemExit(OUT_OF_TIME) from None

    def parse(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """The flags of a command line, or of the program's own."""
        parser = Parser(prog=f"python -m experiments.{self.name}.run", description=self.about)
        add = parser.add_argument
        lengths = ", ".join(f"{name} {scale.flag('lpd', '--epochs')}" for name, scale in self.scales.items())
        add("--data", type=Path, required=True, help="photos.npz with both splits, a folder with train/ and test/, or "
            f"torchvision's {CIFAR10_FOLDER}")  # fmt: skip
        add("--download", action="store_true", help=f"let torchvision download --data, a folder named {CIFAR10_FOLDER}")
        add("--output_dir", type=Path, default=Path("runs") / self.name, help="everything that is made")
        add("--stage", nargs="+", choices=self.stages, default=list(self.stages), help="only these stages")
        sizes = "; ".join(f"{name}: {scale.summary}" for name, scale in self.scales.items())
        add("--scale", choices=self.scales, default="full", help=f"{sizes} (default: full)")
        add("--epochs", type=int, help=f"of the LPD training, for a faster or slower machine (default: {lengths})")
        add("--inception_path", type=Path, help="Inception weights: FID as well, for one seed (doubles the table's "
            "time)")  # fmt: skip
        parser.add_config(RunConfig)
        add("--plan", action="store_true", help="print how much work it is and stop")
        return parser.parse_args(words)

    def _print_plan(self, scale: Scale, fid: bool) -> None:
        """The work to come, in cells and in floating point operations."""
        size = {"img_size": scale.img_size, "stride": scale.stride, "class_num": self.classes}
        name, codes = scale.flag("lpd", "--model"), int(scale.flag("tokenizer", "--codebook_size"))
        model, epochs = model_config(name, **size, vocab_size=codes), int(scale.flag("lpd", "--epochs"))
        photos = scale.used(self.photos)
        pflop = epochs * photos * training_flops(model) / 1e15
        for training in scale.trainings:
            print(f"training {training}: {name}, {epochs} epochs of {photos:,} photos, {pflop:.4g} PFLOP")
        for kind, cells, images, pflop in plan(scale, model, fid):
            print(f"{kind}: {cells} cells, {images:,} images, {pflop:.4g} PFLOP")

    def _run_stages(self, args: argparse.Namespace, scale: Scale) -> None:
        dist = Dist(0, 1, resolve_device(args.device))
        out, inception, stages = args.output_dir, args.inception_path, Stages(args.output_dir, args.time_limit)
        splits = self._find_photos(args)
        photos = describe_photos(splits, scale)
        check_record(out, args.scale, scale, photos)
        if scale.subset is not None:
            splits = subset_of(splits, scale, out / f"subset{scale.subset}.npz")
        validation = splits[1] if self.validation else None
        train, test, scored = (*splits, splits[1]) if self.prepare is None else self.prepare(out, splits, scale)
        bf16 = ("--bf16",) if dist.device.type == "cuda" else ()
        more = {"tokenizer": ("--test_path", test, *bf16), "lpd": bf16}
        flags = {stage: (*more.get(stage, ()), *words) for stage, words in scale.flags.items()}
        common = ("--img_size", str(scale.img_size), "--device", args.device)
        train_and_judge(
            stages, out, train, test, scored, common, flags, args.stage, inception, scale.trainings, validation
        )
        call = Call(out, scale, dist, stages, splits)
        if "sweep" in args.stage:
            action = partial(run_sweep, out, scale, dist, inception, stages)
            stages.run("sweep", action, "the cells of experiments/cells.py", always=True)
        for name, stage in self.more_stages.items():
            if name in args.stage:
                stage(call)
        if "report" in args.stage:
            seconds = {name: state["seconds"] for name, state in stages.states().items()}
            results, folder = collect(out, scale, seconds, photos), self.report.folder(out)
            if self.more_results is not None:
                results |= self.more_results(call, folder / PICTURES)
            self.report.write(out, scale, results)

    def _find_photos(self, args: argparse.Namespace) -> tuple[str, str]:
        """The paths of both splits, downloaded where the flags say so; UserError for what they name in vain."""
        if args.inception_path is not None and not args.inception_path.is_file():
            raise UserError(f"--inception_path {args.inception_path} does not exist.")
        if args.download:
            if args.data.name != CIFAR10_FOLDER:
                raise UserError(f"--download needs --data to end in {CIFAR10_FOLDER}, not {args.data}.")
            from torchvision.datasets import CIFAR10

            CIFAR10(args.data.parent, download=True)
        return split_paths(args.data)


def split_paths(data: Path) -> tuple[str, str]:
    """Training and test images of what --data names, as every command's --data_path takes them."""
    if data.suffix == ".npz" or data.name == CIFAR10_FOLDER:
        return f"{data}:train", f"{data}:test"
    return str(data / "train"), str(data / "test")


def subset_of(splits: tuple[str, str], scale: Scale, path: Path) -> tuple[str, str]:
    """``scale.subset`` photos of each split, evenly spread over the split, as an image archive, made where missing."""
    if path.exists():
        return split_paths(path)
    files, labels, numbers = [], [], []
    for number, source in enumerate(splits):
        images = open_images(source, scale.img_size)
        for index in np.linspace(0, len(images) - 1, scale.used(len(images))).astype(int).tolist():
            file = io.BytesIO()
            images.read(index).save(file, "PNG")
            files.append(file.getvalue())
            labels.append(int(images.labels[index]))
            numbers.append(number)
    write_image_archive(path, files, labels, images.classes, numbers)
    return split_paths(path)


def describe_photos(splits: tuple[str, str], scale: Scale) -> dict[str, Any]:
    """By split: where its photos are from, how many of them are used, and a SHA-256 of all their bytes and labels."""
    found = {}
    for name, split in zip(SPLITS, splits, strict=True):
        images = open_images(split, scale.img_size)
        digest = images.fingerprint()
        if isinstance(images, ImageFiles):  # whose fingerprint is of their names
            parts = (digest, *(sha256(images.root / path) for path in images.paths))
            digest = hashlib.sha256("".join(parts).encode()).hexdigest()
        found[name] = {"source": Path(images.source).name, "images": scale.used(len(images)), "sha256": digest}
    return found


def check_record(out: Path, name: str, scale: Scale, photos: dict[str, Any]) -> None:
    """Write down what the work of an output folder is on: the scale's name, its epochs and the photos.

    A folder without a record gets this one, whatever it holds.

    Raises:
        UserError: if the folder has the record of something else.
    """
    path, what = out / "experiment.json", "record of an experiment"
    hashes = {split: found["sha256"] for split, found in photos.items()}
    record = {"scale": name, "epochs": int(scale.flag("lpd", "--epochs")), "photos": hashes}
    if not path.exists():
        write_json(path, record)
        return
    with reading(what, path):
        before = read_json(what, path)
        differing = [key for key, value in record.items() if before[key] != value]
    if differing:
        key = differing[0]
        other = "other photos than those of --data" if key == "photos" else f"--{key} {before[key]}, not {record[key]}"
        raise UserError(f"{out} holds work with {other}; give another --output_dir.")
