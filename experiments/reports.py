"""The results of an experiment: everything measured in one JSON file, its page, and where the repository keeps both."""

from __future__ import annotations

import datetime
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
from util.errors import UserError, reading, reason_of
from util.files import atomic_write, check_output_dir, write_json
from util.readers import read_json, read_json_lines

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile("[A-Za-z0-9_-]+")  # of a publication, in names of files
RESULTS = "results of an experiment"


def collect(out: Path, scale: Scale, seconds: dict[str, float], data: dict[str, Any]) -> dict[str, Any]:
    """Everything measured in an output folder; UserError before the first cell is.

    Args:
        seconds: of the stages, by name. ``data``: the photos of each split, as plain data.
    """
    rows = finished_rows(out, scale)
    if not rows:
        raise UserError(f"{out} has no evaluated cells yet; run the stage sweep before the report.")
    path = out / "eval" / rows[0]["name"] / "results.json"
    first = read_figures("results", path, "environment", "settings", "model", "record")
    with reading("results", path):
        decode_path = first["settings"]["decode_path"]
        hashes = {name: value for name, value in first["record"].items() if name.endswith("sha256")}
    quality = tokenizer_path(out).parent / "metrics.json"
    with reading("classifier", classifier_path(out)):
        classifier = load_checkpoint(classifier_path(out))["metadata"]
    floors = sorted((out / "floors").glob("*.json"))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": data,
        "settings": asdict(scale),
        "environment": first["environment"],
        "decode_path": decode_path,
        "model": first["model"],
        "hashes": hashes,
        "stage_sec": seconds,
        "tokenizer": read_figures("quality of the tokenizer", quality, "psnr_db", "codebook_share", "tokenizer"),
        "classifier": classifier,
        "floors": {path.stem: read_figures("scores", path, "extractor") for path in floors},
        "trainings": {name: training(out / name) for name in scale.trainings if (out / name / LAST).exists()},
        "cells": rows,
    }


def read_figures(what: str, path: Path, *names: str) -> dict[str, Any]:
    """The object of a JSON file. UserError, with ``what`` the file is, unless it has these names."""
    with reading(what, path):
        found: dict[str, Any] = read_json(what, path)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return found


def training(folder: Path) -> dict[str, Any]:
    """Losses and length of an LPD training."""
    lines = read_json_lines(folder / "metrics.jsonl", "step", "epoch", "loss")
    if not lines:
        raise UserError(f"{folder} has no metrics.jsonl with losses; train it again.")
    kept = ("step", "epoch", "loss", "val_loss")
    return {
        "loss_curve": [{name: line[name] for name in kept if name in line} for line in lines],
        "final_loss": lines[-1]["loss"],
        "epochs": read_figures("record of a training", (folder / LAST).with_suffix(".json"), "epoch")["epoch"],
    }


@dataclass(frozen=True)
class Report:
    """How the results of an experiment become a page.

    Args:
        page: the page as Markdown, from the results alone. ``plot``: draws their plots into a folder.
        samples: numbers of steps whose grid of pictures (locality-aware, first seed, first model) stands on the page,
            beside that of ``Scale.tuning_steps``.
    """

    name: str
    page: Callable[[dict[str, Any]], str]
    plot: Callable[[dict[str, Any], Path], None]
    samples: tuple[int, ...] = ()

    def folder(self, out: Path) -> Path:
        """Where the report of an output folder goes, with a folder for its pictures."""
        (out / "report" / PICTURES).mkdir(parents=True, exist_ok=True)
        return out / "report"

    def title(self, scale: Scale) -> str:
        """What the published page and pictures of a scale are called."""
        return f"{self.name}_{scale.variant}" if scale.variant else self.name

    def write(self, out: Path, scale: Scale, results: dict[str, Any]) -> None:
        """Page, plots, pictures and results, into the :meth:`folder` of an output folder.

        Raises:
            UserError: if the results give no page; the page and the results that are there stay then.
        """
        folder, results = self.folder(out), {"experiment": self.title(scale)} | results
        try:
            text = self.page(results)
            self.plot(results, folder / PICTURES)
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:  # the kind depends on what is wrong with them
            raise UserError(f"the figures in {out} give no page ({reason_of(error)}); measure them again.") from None
        first = results["cells"][0]["model"]
        for row in chosen(results["cells"], "table", order="lpd", model=first):
            if row["steps"] in (*self.samples, scale.tuning_steps):
                grid = out / "eval" / row["name"] / "grid.png"
                shutil.copy(grid, folder / PICTURES / f"{self.title(scale)}_samples_{row['steps']}.png")
        path = folder / f"{self.name}.json"
        write_json(path, results)
        self._write_page(folder, text)
        print(f"results: {path}, page: {path.with_suffix('.md')}")

    def draw(self, folder: Path) -> None:
        """Page and plots of a report folder, from its JSON file. UserError if that is missing or something else."""
        path, results = folder / f"{self.name}.json", self._read(folder)
        check_output_dir(folder)
        (folder / PICTURES).mkdir(exist_ok=True)
        with reading(RESULTS, path):
            text = self.page(results)
            self.plot(results, folder / PICTURES)
        self._write_page(folder, text)

    def _write_page(self, folder: Path, text: str) -> None:
        with atomic_write(folder / f"{self.name}.md") as file:
            file.write(text.encode())

    def _read(self, folder: Path) -> dict[str, Any]:
        """The results of a report folder, whose title, which names files, is one of this experiment's."""
        path = folder / f"{self.name}.json"
        if not path.is_file():
            raise UserError(f"{folder} has no {path.name}; it is written by the stage report.")
        results = read_figures(RESULTS, path, "experiment", "settings")
        if not re.fullmatch(f"{self.name}(_{NAME.pattern})?", str(results["experiment"])):
            raise UserError(f"{path} is of another experiment, {results['experiment']!r}, not of {self.name}.")
        return results

    def published(self, folder: Path) -> str:
        """The title under which a report folder is published.

        Raises:
            UserError: if it has no results, no page or no pictures, or those of another experiment or of a test run.
        """
        results, page, pictures = self._read(folder), folder / f"{self.name}.md", folder / PICTURES
        if not (page.is_file() and pictures.is_dir()):
            raise UserError(f"{folder} has no page {page.name} or no folder {PICTURES}; run the stage report again.")
        with reading(RESULTS, folder / f"{self.name}.json"):
            subset = results["settings"]["subset"]
        if subset is not None:
            raise UserError(
                f"{folder} is of a run with --scale tiny, whose figures mean nothing and are not published."
            )
        return str(results["experiment"])

    def publish(self, folder: Path, name: str, root: Path) -> None:
        """Copy a report to where the repository keeps pages, pictures and measurements.

        Raises:
            UserError: as :meth:`published`, before anything is copied.
        """
        title, path = self.published(folder), folder / f"{self.name}.json"
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
