"""The results of a run: everything measured in one JSON file, and its page.

    python -m experiments.cifar10.report RUN/report [--publish NAME]

makes page and plots of a report folder again; --publish also puts them where the repository keeps them.
"""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path

from experiments.cifar10.page import PICTURES, Results, page, plot_quality
from experiments.cifar10.scales import IMG_SIZE, Scale
from experiments.cifar10.sweep import cell_of, finished_rows
from util.checkpoint import load_checkpoint
from util.cli import Parser, exit_on_user_error
from util.data.images import open_images
from util.errors import UserError
from util.files import sha256, write_json
from util.plots import plot_loss

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = "cifar10.json", "cifar10.md"
CURVE_POINTS = 400


def collect(out: Path, scale: Scale, seconds: dict[str, float], data: tuple[str, str]) -> Results:
    """Everything measured in an output folder, as plain data. UserError if the sweep has no results yet."""
    cells = list(finished_rows(out, scale))
    if not cells:
        raise UserError(f"{out} has no evaluated cells yet; run the stage sweep before the report.")
    lines = [json.loads(line) for line in (out / "lpd" / "metrics.jsonl").read_text().splitlines()]
    curve = [{name: line[name] for name in ("step", "epoch", "loss")} for line in lines]
    train, test = (open_images(path, IMG_SIZE) for path in data)
    return {
        "experiment": "cifar10",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {
            name: {"source": Path(images.source).name, "images": len(images), "sha256": images.fingerprint()}
            for name, images in (("train", train), ("test", test))
        },
        "settings": asdict(scale),
        "environment": cells[0][1]["environment"],
        "decode_path": cells[0][1]["settings"]["decode_path"],
        "model": cells[0][1]["model"],
        "stage_sec": seconds,
        "tokenizer": json.loads((out / "tokenizer" / "metrics.json").read_text()),
        "classifier": load_checkpoint(out / "classifier.pt")["metadata"],
        "floors": {path.stem: json.loads(path.read_text()) for path in sorted((out / "floors").glob("*.json"))},
        "training": {
            "loss_curve": curve[:: max(1, len(curve) // CURVE_POINTS)],
            "final_loss": curve[-1]["loss"],
            "images_per_sec": statistics.median(line["images_per_sec"] for line in lines),
            "checkpoint_sha256": sha256(out / "lpd" / "checkpoint-last.pth"),
        },
        "cells": [row for row, _ in cells],
    }


def write_report(out: Path, scale: Scale, seconds: dict[str, float], data: tuple[str, str]) -> None:
    """Collect the results of an output folder into its subfolder ``report``, with page and plots."""
    folder = out / "report"
    results = collect(out, scale, seconds, data)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, results)
    for cell in map(cell_of, results["cells"]):
        grid = out / "eval" / cell.name / "grid.png"
        if (cell.kind, cell.order) == ("table", "lpd") and cell.steps in (256, 20) and grid.exists():
            shutil.copy(grid, folder / PICTURES / f"cifar10_samples_{cell.steps}.png")
    draw(folder)
    print(f"results: {folder / RESULTS}, page: {folder / PAGE}")


def draw(folder: Path) -> None:
    """Page and plots of a report folder, from its JSON file."""
    path = folder / RESULTS
    if not path.is_file():
        raise UserError(f"{folder} has no {RESULTS}; it is written by the stage report.")
    results = json.loads(path.read_text())
    plot_quality(results, folder / PICTURES / "cifar10_quality.png")
    plot_loss(results["training"]["loss_curve"], folder / PICTURES / "cifar10_loss.png")
    (folder / PAGE).write_text(page(results))


def publish(folder: Path, name: str, root: Path = ROOT) -> None:
    """Copy a report to where the repository keeps pages, pictures and measurements. UserError for a test run's."""
    if json.loads((folder / RESULTS).read_text())["settings"]["subset"] is not None:
        raise UserError(f"{folder} is of a --tiny run, whose figures mean nothing; only a full one can be published.")
    (root / "docs" / PICTURES).mkdir(parents=True, exist_ok=True)
    (root / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / RESULTS, root / "benchmarks" / "results" / f"cifar10_{name}.json")
    shutil.copy(folder / PAGE, root / "docs" / PAGE)
    for picture in (folder / PICTURES).glob("*.png"):
        shutil.copy(picture, root / "docs" / PICTURES)


def main() -> None:
    parser = Parser(prog="python -m experiments.cifar10.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="report folder of a run")
    parser.add_argument("--publish", metavar="NAME", help="copy to docs/ and benchmarks/results/cifar10_NAME.json")
    args = parser.parse_args()
    draw(args.folder)
    if args.publish:
        publish(args.folder, args.publish)


if __name__ == "__main__":
    exit_on_user_error(main)
