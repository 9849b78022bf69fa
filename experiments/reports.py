"""The results of an experiment: everything measured in one JSON file, its page, and where the repository keeps both."""

from __future__ import annotations

import datetime
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.cells import Scale, classifier_path, finished_rows, tokenizer_path
from experiments.pages import PICTURES, chosen
from util.checkpoint import LAST, load_checkpoint
from util.cli import Parser
from util.data.images import open_images
from util.errors import UserError, reading
from util.files import atomic_write, check_output_dir, write_json
from util.readers import read_json, read_json_lines

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a publication, in names of files
RESULTS = "results of an experiment"


def collect(out: Path, scale: Scale, seconds: dict[str, float], data: tuple[str, str]) -> dict[str, Any]:
    """Everything measured in an output folder; UserError before the first cell is."""
    rows = finished_rows(out, scale)
    if not rows:
        raise UserError(f"{out} has no evaluated cells yet; run the stage sweep before the report.")
    first = read_json("results", out / "eval" / rows[0]["name"] / "results.json")
    images = {name: open_images(path, scale.img_size) for name, path in zip(("train", "test"), data, strict=True)}
    trained = [name for name in scale.trainings if (out / name / LAST).exists()]
    return {
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
        "tokenizer": read_json("quality of the tokenizer", tokenizer_path(out).parent / "metrics.json"),
        "classifier": load_checkpoint(classifier_path(out))["metadata"],
        "floors": {path.stem: read_json("scores", path) for path in sorted((out / "floors").glob("*.json"))},
        "trainings": {name: training(out / name) for name in trained},
        "cells": rows,
    }


def training(folder: Path) -> dict[str, Any]:
    """Losses, length and model of an LPD training."""
    lines = read_json_lines(folder / "metrics.jsonl", "step", "epoch", "loss")
    if not lines:
        raise UserError(f"{folder} has no metrics.jsonl with losses; train it again.")
    kept = ("step", "epoch", "loss", "val_loss")
    record = (folder / LAST).with_suffix(".json")
    with reading("record of a training", record):
        trained = read_json("record of a training", record)
        epochs, model = trained["epoch"], trained["config"]
    return {
        "loss_curve": [{name: line[name] for name in kept if name in line} for line in lines],
        "final_loss": lines[-1]["loss"],
        "epochs": epochs,
        "model": model,
    }


@dataclass(frozen=True)
class Report:
    """How the results of an experiment become a page.

    Args:
        page: the page as Markdown, from the results alone. ``plot``: draws their plots into a folder.
        samples: numbers of steps whose grid of pictures (locality-aware, first seed, first model) stands on the page.
    """

    name: str
    page: Callable[[dict[str, Any]], str]
    plot: Callable[[dict[str, Any], Path], None]
    samples: tuple[int, ...]

    def folder(self, out: Path) -> Path:
        """Where the report of an output folder goes, with a folder for its pictures."""
        (out / "report" / PICTURES).mkdir(parents=True, exist_ok=True)
        return out / "report"

    def title(self, scale: Scale) -> str:
        """What the published page and pictures of a scale are called."""
        return f"{self.name}_{scale.variant}" if scale.variant else self.name

    def write(self, out: Path, scale: Scale, results: dict[str, Any]) -> None:
        """Page, plots, pictures and results, into the :meth:`folder` of an output folder."""
        folder = self.folder(out)
        write_json(folder / f"{self.name}.json", {"experiment": self.title(scale)} | results)
        first = results["cells"][0]["model"]
        for row in chosen(results["cells"], "table", order="lpd", model=first):
            if row["steps"] in self.samples:
                grid = out / "eval" / row["name"] / "grid.png"
                shutil.copy(grid, folder / PICTURES / f"{self.title(scale)}_samples_{row['steps']}.png")
        self.draw(folder)
        print(f"results: {folder / self.name}.json, page: {folder / self.name}.md")

    def draw(self, folder: Path) -> None:
        """Page and plots of a report folder, from its JSON file."""
        path = folder / f"{self.name}.json"
        if not os.path.isfile(path):
            raise UserError(f"{folder} has no {path.name}; it is written by the stage report.")
        check_output_dir(folder)
        with reading(RESULTS, path):
            results = read_json(RESULTS, path)
            if NAME.fullmatch(results["experiment"]) is None:  # names files
                raise ValueError(f"its experiment is called {results['experiment']!r}")
            text = self.page(results)
            self.plot(results, folder / PICTURES)
        with atomic_write(path.with_suffix(".md")) as file:
            file.write(text.encode())

    def publish(self, folder: Path, name: str, root: Path) -> None:
        """Copy a report that :meth:`draw` has accepted to where the repository keeps pages, pictures and measurements.

        Raises:
            UserError: for a test run's.
        """
        path = folder / f"{self.name}.json"
        with reading(RESULTS, path):
            results = read_json(RESULTS, path)
            subset, title = results["settings"]["subset"], results["experiment"]
        if subset is not None:
            raise UserError(
                f"{folder} is of a run with --scale tiny, whose figures mean nothing and are not published."
            )
        (root / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder / PICTURES, root / "docs" / PICTURES, dirs_exist_ok=True)
        shutil.copy(path, root / "benchmarks" / "results" / f"{title}_{name}.json")
        shutil.copy(path.with_suffix(".md"), root / "docs" / f"{title}.md")

    def main(self) -> None:
        """The command that makes page and plots of a report folder again and may publish them."""
        text = "Page and plots of a report folder again, from its JSON file; --publish puts them into this repository."
        parser = Parser(prog=f"python -m experiments.{self.name}.report", description=text)
        parser.add_argument("folder", type=Path, help="report folder of a run")
        parser.add_argument(
            "--publish", metavar="NAME", help=f"copy to docs/ and benchmarks/results/, {self.name}_NAME.json"
        )
        args = parser.parse_args()
        if args.publish is not None and NAME.fullmatch(args.publish) is None:
            raise UserError(f"--publish {args.publish!r} must be letters, digits, '-' and '_'.")
        self.draw(args.folder)
        if args.publish is not None:
            self.publish(args.folder, args.publish, ROOT)
