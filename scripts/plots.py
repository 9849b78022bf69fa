"""``python -m scripts.plots``: what a run learnt, and how a model looks at a picture, drawn.

python -m scripts.plots loss runs/mine runs/other --output loss.png
python -m scripts.plots quality runs/mine/eval/*/results.json --output quality.png
python -m scripts.plots attention --pretrained_ckpt runs/mine/checkpoint-last.pth --output attention.png
"""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from engine.attention import AttentionByDistance, in_training_pass, while_decoding
from engine.evaluation.results_table import load_results, results_file
from models.sampling import Sampling, image_seeds
from orders.config import OrderConfig
from orders.schedule import default_steps
from scripts.picture_flags import GeneratorConfig
from util.cli import Parser, exit_on_user_error, from_args, path_ending_in
from util.data.codes import open_codes, verify_files
from util.errors import UserError, reading
from util.files import check_output_file, sha256, write_json
from util.plots import SUFFIXES, plot_attention, plot_curves
from util.readers import read_json, read_json_lines

LOSSES = {"loss": "training", "val_loss": "validation", "val_loss_ema": "validation, averaged weights"}
FIGURES = {
    "frechet_distance": "Fréchet distance",
    "fid": "FID",
    "inception_score": "Inception Score",
    "class_accuracy": "share read as the class asked for",
    "sfid": "sFID",
    "precision": "precision",
    "recall": "recall",
    "sec_per_image": "seconds per image",
    "latency_s": "seconds for one image, batch 1",
}
# Results that differ in one of these are two curves.
_CURVE_SETTINGS = (
    *("order", "proximity_threshold", "repulsion_threshold", "cfg", "cfg_schedule", "temperature", "top_k", "top_p"),
    *("bf16", "num_images"),
)
_BATCH = 8  # images measured at once


def plot_losses(path: Path, runs: Iterable[Path]) -> None:
    """Draw the losses in the `metrics.jsonl` of runs against the epoch; a run is that file or its folder.

    Where all runs have a codebook of the same size, a line shows the loss of guessing among its codes.

    Raises:
        UserError: for a file that is missing, damaged or without losses.
    """
    files = [run / "metrics.jsonl" if run.is_dir() else run for run in runs]
    names = [file.absolute().parent.name for file in files]
    if len(set(names)) < len(names):
        names = [str(file.parent) for file in files]
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for file, name in zip(files, names, strict=True):
        with reading("file of metrics", file):
            lines = read_json_lines(file, "epoch")
        for key, kind in LOSSES.items():
            points = [(line["epoch"], line[key]) for line in lines if type(line.get(key)) in (int, float)]
            if points:
                epochs, losses = zip(*points, strict=True)
                curves[f"{name}: {kind}" if len(files) > 1 else kind] = (list(epochs), list(losses))
            elif key == "loss":
                raise UserError(f"{file} holds no losses yet; a training writes some every --log_freq steps.")
    vocabularies = {_vocab_size(file.parent / "train_settings.json") for file in files}
    if len(vocabularies) == 1 and (size := vocabularies.pop()):
        last = max(max(epochs) for epochs, _ in curves.values())
        curves[f"ln {size}: guessing"] = ([0, last], [math.log(size)] * 2)
    plot_curves(path, curves, "epoch", "cross-entropy per token, nats")


def _vocab_size(settings: Path) -> int | None:
    """Of the model of a training; None where nothing says so."""
    if not settings.is_file():
        return None
    with reading("record of a training", settings):
        size = operator.index(read_json("record of a training", settings)["model"]["vocab_size"])
        if size < 1:
            raise ValueError(f"a codebook of {size}")
        return size


def plot_quality(path: Path, results: Sequence[Path], figure: str) -> None:
    """Draw a figure of evaluations against their steps: a line per order, guidance and so on.

    Several evaluations in one point, such as those of several seeds, give their mean and an error bar.

    Raises:
        UserError: for a file that is missing or something else, or where none has the figure.
    """
    runs: list[dict[str, Any]] = []
    points: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    for path_of_results in results:
        loaded = load_results(path_of_results)
        runs += loaded
        with reading("results", results_file(path_of_results)):
            for run in loaded:
                if run.get(figure) is not None:
                    steps = len(run["settings"]["group_sizes"])
                    points.setdefault(_curve(run), {}).setdefault(steps, []).append(float(run[figure]))
    if not points:
        have = [name for name in FIGURES if any(run.get(name) is not None for run in runs)]
        raise UserError(f"none of the results has the figure {figure}; they have {', '.join(have) or 'no figures'}.")
    names = ("", *_CURVE_SETTINGS[1:], "weights")
    differ = [number for number, values in enumerate(zip(*points, strict=True)) if len(set(values)) > 1]
    curves = {}
    for key, found in points.items():
        label = ", ".join([str(key[0]), *(f"{names[number]} {key[number]}" for number in differ if number)])
        counts = sorted(found)
        deviations = [stdev(found[n]) if len(found[n]) > 1 else 0.0 for n in counts]
        curves[label] = (counts, [mean(found[n]) for n in counts], deviations)
    plot_curves(path, curves, "decoding steps", FIGURES[figure], log_x=True)


def _curve(run: dict[str, Any]) -> tuple[Any, ...]:
    weights = run["record"].get("pretrained_ckpt", {})
    return (*(run["settings"][name] for name in _CURVE_SETTINGS), weights.get("path"))


def loss(args: argparse.Namespace) -> None:
    """Draw training and validation losses of one or several runs."""
    plot_losses(args.output, args.runs)


def quality(args: argparse.Namespace) -> None:
    """Draw a score of several evaluations against their decoding steps."""
    plot_quality(args.output, args.results, args.figure)


def attention(args: argparse.Namespace) -> None:
    """Measure and draw how far attention reaches, per layer and head; writes the figures as JSON beside the plot."""
    if args.num_images < 1:
        raise UserError(f"--num_images is {args.num_images}; it must be at least 1.")
    sampling = from_args(Sampling, args)
    generator = from_args(GeneratorConfig, args).open_generator()
    model, config, device = generator.model, generator.model.config, generator.device
    sampling.check_top_k(config.vocab_size)
    if args.generation_steps is None:
        args.generation_steps = default_steps(config.grid_size)
    orders = from_args(OrderConfig, args).for_grid(config.grid_size, args.seed, args.num_images)
    dataset = None
    if args.cached_path is not None:
        tokenizer_hash = sha256(generator.paths["vqgan_path"])
        dataset = open_codes(args.cached_path, img_size=config.img_size, tokenizer_hash=tokenizer_hash)
        if dataset.header is not None:
            verify_files(dataset.path)
        if len(dataset.classes) > config.class_num:
            raise UserError(
                f"--cached_path {args.cached_path} holds images of {len(dataset.classes)} classes, the model has "
                f"{config.class_num}."
            )
    measured = AttentionByDistance(config.depth, config.num_heads, config.grid_size)
    numbers = np.arange(args.num_images if dataset is None else min(args.num_images, len(dataset)))
    for batch in np.array_split(numbers, math.ceil(len(numbers) / _BATCH)):
        drawn = torch.from_numpy(orders.of_images(batch)).to(device, torch.int64)
        if dataset is None:
            labels = torch.from_numpy(batch % config.class_num).to(device)
            seeds = image_seeds(args.seed, torch.from_numpy(batch)).to(device)
            while_decoding(model, labels, drawn, seeds, orders.group_sizes, sampling, measured)
        else:
            # Spread over the data set, whose images lie class by class.
            codes, _, labels = dataset.get_batch(batch * len(dataset) // len(numbers))
            in_training_pass(model, codes.to(device), labels.to(device), drawn, orders.group_sizes, measured)
    figures = {
        "measured": "while decoding" if dataset is None else "in a training pass",
        "checkpoint": str(generator.source),
        "group_sizes": list(orders.group_sizes),
        "order": orders.spec.kind,
        "num_images": len(numbers),
        **measured.figures(),
    }
    write_json(args.output.with_suffix(".json"), figures)
    context = figures["context"]
    title = f"Attention of queries to known tokens, {figures['measured']}, {len(numbers)} images"
    plot_attention(args.output, context["distances"], context["per_token"], context["even"], title)


def _parser() -> Parser:
    parser = Parser(prog="python -m scripts.plots", description="Plots of runs and of what a model attends to.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None]) -> Parser:
        added = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument(
            "--output", type=path_ending_in(*SUFFIXES), required=True, help="picture: .png, .pdf or .svg"
        )
        return added

    added = command(loss)
    added.add_argument("runs", nargs="+", type=Path, help="folders of trainings, or their metrics.jsonl")

    added = command(quality)
    added.add_argument("results", nargs="+", type=Path, help="results.json, results.jsonl, or folders with the former")
    added.add_argument("--figure", choices=tuple(FIGURES), default="frechet_distance", help="what is drawn")

    added = command(attention)
    added.add_config(GeneratorConfig)
    added.add_argument(
        "--cached_path", type=Path, help="code cache: measure a training pass over its images instead of decoding"
    )
    added.add_argument("--num_images", type=int, default=32, help="images to measure")
    added.add_argument("--seed", type=int, default=0, help="of orders and draws")
    added.add_argument("--steps", dest="generation_steps", metavar="STEPS", type=int, help="decoding steps")
    added.add_config(OrderConfig, skip=("generation_steps",))
    added.add_config(Sampling)
    return parser


def main() -> None:
    args = _parser().parse_args()
    check_output_file(args.output)
    args.run(args)


if __name__ == "__main__":
    exit_on_user_error(main)
