"""The command that compares generation orders and numbers of steps for one checkpoint:

    python -m engine.evaluation.compare --pretrained_ckpt runs/mine/checkpoint-last.pth --vqgan_path tokenizer.pt \\
        --orders lpd raster random --steps 8 16 64 --num_images 1000 --cfg 3 \\
        --feature_extractor classifier.pt --reference_statistics reference.npz --output_dir runs/mine/compared

Each pair is an evaluation with a folder of its own, ``<order>_<steps>``; one that is finished is not made again. The
output folder gets a table, a curve, and a strip of pictures in which a column is the same class, seed and model.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.config import EvalConfig
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import EvalInputs, open_inputs
from engine.evaluation.results_table import markdown_table, row_of
from engine.image_generator import ImageGenerator
from engine.scoring.features import FeatureExtractor
from orders.draw import ORDER_KINDS
from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, part, record, setting
from util.dist import DeviceConfig, Dist, distributed
from util.errors import UserError
from util.files import atomic_write, check_output_dir
from util.folder_lock import FolderLock
from util.logger import setup_logging
from util.pictures import image_grid, save_png
from util.plots import plot_curves
from util.readers import read_json

logger = logging.getLogger(__name__)

STRIP_CLASSES = 8
# What a curve shows: the first of these that was measured, and what it is called.
CURVES = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "class_accuracy": "share read as the class asked for",
    "sec_per_image": "seconds per image",
}
# Settings on which neither images nor scores depend.
FREE = ("output_dir", "eval_bsz")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(DeviceConfig):
    """Which model is compared, in which orders and numbers of steps."""

    pretrained_ckpt: Path = setting(help="the checkpoint: a file, an exported folder, or user/model on the hub")
    vqgan_path: Path | None = setting(None, "its tokenizer (default: that of an exported folder)")
    use_ema: bool = setting(False, "take the moving average of the weights")
    orders: tuple[str, ...] = setting(
        ("lpd", "random", "raster"), "kinds of orders (default: lpd random raster)", choices=ORDER_KINDS
    )
    steps: tuple[int, ...] = setting((8, 16, 32), "numbers of decoding steps (default: 8 16 32)", at_least=1)
    evaluation: EvalConfig = part("generation and scores")

    def __post_init__(self) -> None:
        check(self)


class Comparison:
    """Evaluations of one model that differ in order and steps only.

    Args:
        config: of all evaluations; their folders are made in its ``output_dir``.
        about: plain data that tells the model from others, kept with the results.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        config: EvalConfig,
        dist: Dist,
        about: dict[str, Any],
    ) -> None:
        self.generator, self.config, self.dist, self.about = generator, config, dist, about
        self._extractor: FeatureExtractor | None = None  # loaded with the first inputs

    def cell(self, order: str, steps: int) -> EvalConfig:
        """The evaluation of one order and number of steps."""
        orders = dataclasses.replace(self.config.orders, order=order, generation_steps=steps)
        return dataclasses.replace(self.config, output_dir=self.config.output_dir / f"{order}_{steps}", orders=orders)

    def open(self, config: EvalConfig) -> EvalInputs:
        """The inputs of one of the evaluations, checked; UserError for what does not fit."""
        trained = self.generator
        inputs = open_inputs(config, trained.model.config, self.dist, trained.classes, self._extractor)
        self._extractor = inputs.extractor
        return inputs

    def results(self, order: str, steps: int) -> dict[str, Any]:
        """The results of one pair: those that are there already, or made now; called by all processes."""
        config, trained = self.cell(order, steps), self.generator
        asked = {name: value for name, value in record(config).items() if name not in FREE}
        about = json.loads(json.dumps(self.about | {"compared": asked}))
        earlier = self.dist.on_main(lambda: _read(config.output_dir / "results.json"))
        if earlier is not None and about.items() <= earlier["record"].items():
            logger.info("%s: evaluated before", config.output_dir)
            return earlier
        return evaluate(trained.model, trained.tokenizer, config, self.open(config), self.dist, record=about)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        results = read_json("results", path)
    except UserError:
        return None
    return results if isinstance(results, dict) and isinstance(results.get("record"), dict) else None


def draw_curve(path: Path, cells: Sequence[tuple[str, int]], results: Sequence[dict[str, Any]]) -> None:
    """A curve over the steps for each order."""
    name = next((name for name in CURVES if all(result.get(name) is not None for result in results)), None)
    if name is None:
        return
    curves = {}
    for order in dict.fromkeys(order for order, _ in cells):
        of_order = [(cell[1], found[name]) for cell, found in zip(cells, results, strict=True) if cell[0] == order]
        curves[order] = tuple(zip(*sorted(of_order), strict=True))
    plot_curves(path, curves, "decoding steps", CURVES[name], log_x=True)


def draw_strip(path: Path, cells: Sequence[tuple[str, int]], generator: ImageGenerator, config: EvalConfig) -> None:
    """A row of pictures for each pair; a column has the same class and random numbers in all of them."""
    count = generator.model.config.class_num
    labels = np.unique(np.linspace(0, count - 1, STRIP_CLASSES).round().astype(int)).tolist()
    names = generator.classes or [f"class {label}" for label in range(count)]
    pictures = [
        np.asarray(picture)
        for order, steps in cells
        for picture in generator(labels, steps, order=order, seed=config.seed, **vars(config.sampling))
    ]
    last = [names[label] for label in labels]
    texts = [""] * (len(pictures) - len(labels)) + last
    grid = image_grid(
        np.stack(pictures), len(labels), texts, row_titles=[f"{order}, {steps} steps" for order, steps in cells]
    )
    save_png(grid, path)


def run(config: CompareConfig, dist: Dist) -> None:
    """Evaluate every pair, write ``results.md``, ``curve.png`` and ``strip.png``, and print the table."""
    evaluation, out = config.evaluation, config.evaluation.output_dir
    generator = ImageGenerator(
        config.pretrained_ckpt, config.vqgan_path, device=dist.device, use_ema=config.use_ema, bf16=evaluation.bf16
    )
    cells = [(order, steps) for order in config.orders for steps in config.steps]
    about: dict[str, Any] = {"ema": config.use_ema, **generator.files()}
    comparison = Comparison(generator, evaluation, dist, about)
    for cell in cells:  # what is wrong with one is said before any work
        comparison.open(comparison.cell(*cell))
    results = [comparison.results(*cell) for cell in cells]
    if not dist.is_main:
        return
    rows = [row_of(out / f"{order}_{steps}", found) for (order, steps), found in zip(cells, results, strict=True)]
    table = markdown_table(rows)
    with atomic_write(out / "results.md") as file:
        file.write(table.encode())
    draw_curve(out / "curve.png", cells, results)
    draw_strip(out / "strip.png", cells, generator, evaluation)
    print(f"{table}\nTable: {out / 'results.md'}; pictures: {out / 'curve.png'}, {out / 'strip.png'}", flush=True)


def main() -> None:
    parser = Parser(
        prog="python -m engine.evaluation.compare",
        description="Compare generation orders and numbers of steps for one checkpoint: a table, a curve, a strip of "
        "pictures. The same command again resumes.",
    )
    parser.add_config(
        CompareConfig,
        {"num_images": 1000, "output_dir": Path("runs/compared")},
        skip=("order", "generation_steps", "group_sizes", "lpd_order_file"),
    )
    config = from_args(CompareConfig, parser.parse_args())
    check_output_dir(config.evaluation.output_dir)
    with distributed(config.device) as dist, FolderLock(config.evaluation.output_dir) as lock:
        setup_logging(dist.rank)
        dist.on_main(lock.acquire)
        run(config, dist)


if __name__ == "__main__":
    exit_on_user_error(main)
