"""Does it hold on real photographs? Trains everything from scratch on 32×32 photos and compares generation orders.

    python -m experiments.cifar10.run --data photos.npz --output_dir runs/cifar10

What is finished is not done again: after an interruption, or when --time_limit has ended a call, the same command
resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from functools import partial
from pathlib import Path

import numpy as np

from experiments.cifar10.report import write_report
from experiments.cifar10.scales import FULL, IMG_SIZE, STRIDE, TINY, Scale
from experiments.cifar10.sweep import plan, run_sweep
from models import model_config
from models.flops import training_flops
from scripts.stages import TRAINING_STAGES, OutOfTime, Stages, train_and_judge
from util.cli import Parser, exit_on_user_error
from util.data.images import CIFAR10_FOLDER, open_images, write_image_archive
from util.dist import DeviceConfig, Dist, resolve_device
from util.errors import UserError
from util.files import check_output_dir
from util.logger import setup_logging
from util.signals import REQUEUE_STATUS

STAGES = (*TRAINING_STAGES, "sweep", "report")
OUT_OF_TIME = REQUEUE_STATUS  # exit status: not finished, run the same command again


def split_paths(data: Path) -> tuple[str, str]:
    """Training and test images of what --data names, as every command's --data_path takes them."""
    if data.suffix == ".npz" or data.name == CIFAR10_FOLDER:
        return f"{data}:train", f"{data}:test"
    return str(data / "train"), str(data / "test")


def write_subset(splits: tuple[str, str], count: int, path: Path) -> None:
    """``count`` photos of each split, evenly spread over the split, as an image archive."""
    files, labels, numbers = [], [], []
    for number, source in enumerate(splits):
        images = open_images(source, IMG_SIZE)
        for index in np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist():
            file = io.BytesIO()
            images.read(index).save(file, "PNG")
            files.append(file.getvalue())
            labels.append(int(images.labels[index]))
            numbers.append(number)
    write_image_archive(path, files, labels, images.classes, numbers)


def lpd_flags(scale: Scale) -> dict[str, str]:
    """The flags of the LPD training, all of which take a value; the last one counts."""
    words = scale.flags["lpd"]
    return dict(zip(words[::2], words[1::2], strict=True))


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
    parser.add_config(DeviceConfig)
    add("--plan", action="store_true", help="print how much work it is and stop")
    return parser.parse_args()


def prepare_data(args: argparse.Namespace, scale: Scale) -> tuple[str, str]:
    """Check everything that the flags name, make the output folder, and give the paths of both splits."""
    if args.time_limit is not None and args.time_limit <= 0:
        raise UserError(f"--time_limit {args.time_limit} must be positive.")
    if args.inception_path is not None and not args.inception_path.is_file():
        raise UserError(f"--inception_path {args.inception_path} does not exist.")
    if args.download:
        if args.data.name != CIFAR10_FOLDER:
            raise UserError(f"--download needs --data to end in {CIFAR10_FOLDER}, not {args.data}.")
        from torchvision.datasets import CIFAR10

        CIFAR10(args.data.parent, download=True)
    check_output_dir(args.output_dir)
    splits = split_paths(args.data)
    for path in splits:
        open_images(path, IMG_SIZE)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if scale.subset is None:
        return splits
    path = args.output_dir / f"subset{scale.subset}.npz"
    if not path.exists():
        write_subset(splits, scale.subset, path)
    return split_paths(path)


def check_epochs(out: Path, scale: Scale) -> None:
    """Raise UserError if the folder's LPD was trained for another number of epochs."""
    path = out / "lpd" / "checkpoint-last.json"
    wanted = int(lpd_flags(scale)["--epochs"])
    trained = json.loads(path.read_text())["args"]["epochs"] if path.exists() else wanted
    if trained != wanted:
        raise UserError(
            f"{out} holds an LPD trained with --epochs {trained}, not {wanted}; resume with {trained} or give another "
            "--output_dir."
        )


def run_stages(args: argparse.Namespace, scale: Scale) -> None:
    check_epochs(args.output_dir, scale)
    train, test = prepare_data(args, scale)
    out, inception, stages = args.output_dir, args.inception_path, Stages(args.output_dir, args.time_limit)
    dist = Dist(0, 1, resolve_device(args.device))
    bf16 = ("--bf16",) if dist.device.type == "cuda" else ()
    more = {"tokenizer": ("--test_path", test, *bf16), "lpd": bf16}
    flags = {stage: (*more.get(stage, ()), *words) for stage, words in scale.flags.items()}
    common = ("--img_size", str(IMG_SIZE), "--device", args.device)
    train_and_judge(stages, out, train, test, test, common, flags, args.stage, inception)
    if "sweep" in args.stage:
        action = partial(run_sweep, out, scale, dist, inception, stages)
        stages.run("sweep", action, "the cells of experiments/cifar10/sweep.py", always=True)
    if "report" in args.stage:
        seconds = {name: state["seconds"] for name, state in stages.states().items()}
        write_report(out, scale, seconds, (train, test))


def main() -> None:
    args = parse()
    scale = TINY if args.tiny else FULL
    if args.epochs is not None:
        lpd = (*scale.flags["lpd"], "--epochs", str(args.epochs))
        scale = dataclasses.replace(scale, flags=scale.flags | {"lpd": lpd})
    if args.plan:
        return print_plan(scale, args.inception_path is not None)
    setup_logging()
    try:
        run_stages(args, scale)
    except OutOfTime as reason:
        print(f"\n{reason}; run the same command again to resume.", flush=True)
        raise SystemExit(OUT_OF_TIME) from None


if __name__ == "__main__":
    exit_on_user_error(main)
