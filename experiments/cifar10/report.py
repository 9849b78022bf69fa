"""The results of a run: everything measured in one JSON file, and its page.

    python -m experiments.cifar10.report RUN/report [--publish NAME]

makes page and plots of a report folder again; --publish also puts them where the repository keeps them.
"""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from experiments.cifar10.page import PICTURES, chosen, page, plot
from experiments.cifar10.scales import IMG_SIZE, Scale
from experiments.cifar10.sweep import finished_rows
from util.checkpoint import load_checkpoint
from util.cli import Parser, exit_on_user_error
from util.data.images import open_images
from util.errors import UserError
from util.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = "cifar10.json", "cifar10.md"


def write_report(out: Path, scale: Scale, seconds: dict[str, float], data: tuple[str, str]) -> None:
    """Collect everything measured in an output folder into its subfolder ``report``, with page and plots."""
    rows = finished_rows(out, scale)
    if not rows:
        raise UserError(f"{out} has no evaluated cells yet; run the stage sweep before the report.")
    first = json.loads((out / "eval" / rows[0]["name"] / "results.json").read_text())
    lines = [json.loads(line) for line in (out / "lpd" / "metrics.jsonl").read_text().splitlines()]
    images = {name: open_images(path, IMG_SIZE) for name, path in zip(("train", "test"), data, strict=True)}
    folder = out / "report"
    results = {
        "experiment": "cifar10",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {
            name: {"source": Path(photos.source).name, "images": len(photos), "sha256": photos.fingerprint()}
            for name, photos in images.items()
        },
        "settings": asdict(scale),
        "environment": first["environment"],
        "decode_path": first["settings"]["decode_path"],
        "model": first["model"],
        "hashes": {name: value for name, value in first["record"].items() if name.endswith("sha256")},
        "stage_sec": seconds,
        "tokenizer": json.loads((out / "tokenizer" / "metrics.json").read_text()),
        "classifier": load_checkpoint(out / "classifier.pt")["metadata"],
        "floors": {path.stem: json.loads(path.read_text()) for path in sorted((out / "floors").glob("*.json"))},
        "training": {
            "loss_curve": [{name: line[name] for name in ("step", "epoch", "loss")} for line in lines],
            "final_loss": lines[-1]["loss"],
            "epochs": json.loads((out / "lpd" / "checkpoint-last.json").read_text())["epoch"],
        },
        "cells": rows,
    }
    write_json(folder / RESULTS, results)
    (folder / PICTURES).mkdir(exist_ok=True)
    for row in chosen(rows, "table"):
        if row["order"] == "lpd" and row["steps"] in (256, 20):
            grid = out / "eval" / row["name"] / "grid.png"
            shutil.copy(grid, folder / PICTURES / f"cifar10_samples_{row['steps']}.png")
    draw(folder)
    print(f"results: {folder / RESULTS}, page: {folder / PAGE}")


def draw(folder: Path) -> None:
    """Page and plots of a report folder, from its JSON file."""
    path = folder / RESULTS
    if not path.is_file():
        raise UserError(f"{folder} has no {RESULTS}; it is written by the stage report.")
    results = json.loads(path.read_text())
    plot(results, folder / PICTURES)
    (folder / PAGE).write_text(page(results))


def publish(folder: Path, name: str, root: Path = ROOT) -> None:
    """Copy a report to where the repository keeps pages, pictures and measurements. UserError for a test run's."""
    if json.loads((folder / RESULTS).read_text())["settings"]["subset"] is not None:
        raise UserError(f"{folder} is of a --tiny run, whose figures mean nothing; only a full one can be published.")
    (root / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / PICTURES, root / "docs" / PICTURES, dirs_exist_ok=True)
    shutil.copy(folder / RESULTS, root / "benchmarks" / "results" / f"cifar10_{name}.json")
    shutil.copy(folder / PAGE, root / "docs" / PAGE)


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
