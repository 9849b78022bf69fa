"""A Markdown table over several evaluations, published figures beside measured ones.

python -m engine.evaluation.results_table runs/eval/*/results.json --output docs/results.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from util.cli import exit_on_user_error
from util.errors import UserError
from util.files import atomic_write

NOTHING = "–"
Results = dict[str, Any]


def _get(results: Results, *keys: str) -> Any:
    """The value at a path of keys; None where the path ends early."""
    value: Any = results
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _figure(form: str, *keys: str) -> Callable[[Results], str]:
    def show(results: Results) -> str:
        value = _get(results, *keys)
        return NOTHING if value is None else format(value, form)

    return show


def _statistics(results: Results) -> str:
    reference = _get(results, "reference")
    return NOTHING if reference is None else f"{Path(reference['path']).name} ({reference['sha256'][:8]})"


def _features(results: Results) -> str:
    return str(_get(results, "extractor", "name") or NOTHING)


def _device(results: Results) -> str:
    device, processes = (_get(results, "environment", key) for key in ("device", "world_size"))
    return NOTHING if device is None else device if processes == 1 else f"{processes} × {device}"


def _other_distance(results: Results) -> str:
    """The Fréchet distance where the features are not Inception's, so that it is no FID."""
    return NOTHING if "fid" in results else _figure(".2f", "frechet_distance")(results)


EXPECTED = ("record", "expected")
# Title, alignment, content. A column in which no run has anything is left out.
COLUMNS: tuple[tuple[str, str, Callable[[Results], str]], ...] = (
    ("images", "--:", _figure("d", "num_images")),
    ("FID, published", "--:", _figure(".2f", *EXPECTED, "fid")),
    ("FID", "--:", _figure(".2f", "fid")),
    ("Fréchet distance", "--:", _other_distance),
    ("IS, published", "--:", _figure(".1f", *EXPECTED, "inception_score")),
    ("IS", "--:", _figure(".1f", "inception_score")),
    ("right class", "--:", _figure(".1%", "class_accuracy")),
    ("sFID", "--:", _figure(".2f", "sfid")),
    ("precision", "--:", _figure(".3f", "precision")),
    ("recall", "--:", _figure(".3f", "recall")),
    ("latency s, published", "--:", _figure(".3f", *EXPECTED, "latency_s")),
    ("latency s", "--:", _figure(".4f", "latency_s")),
    ("images/s, published", "--:", _figure(".1f", *EXPECTED, "images_per_sec")),
    ("images/s", "--:", _figure(".1f", "throughput_images_per_sec")),
    ("images/s with scoring", "--:", _figure(".1f", "images_per_sec")),
    ("features", "---", _features),
    ("statistics", "---", _statistics),
    ("device", "---", _device),
)


def run_name(path: Path, results: Results) -> str:
    """The recipe and what was changed of it, or the folder's name."""
    recipe = _get(results, "record", "recipe")
    if recipe is None:
        return path.absolute().parent.name
    changes = _get(results, "record", "changed") or {}
    return ", ".join([recipe, *(f"{flag} {value}" for flag, value in changes.items())])


def markdown_table(runs: list[tuple[str, Results]]) -> str:
    """One row per run, (name, content of its ``results.json``)."""
    shown = [(title, rule, [show(results) for _, results in runs]) for title, rule, show in COLUMNS]
    shown = [column for column in shown if set(column[2]) != {NOTHING}]
    columns = [("run", "---", [name for name, _ in runs]), *shown]
    rows = zip(*((title, rule, *cells) for title, rule, cells in columns), strict=True)
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |\n" for row in rows)


def read_results(path: Path) -> list[tuple[str, Results]]:
    """The run of a ``results.json``, or of a folder with one; all runs of a ``results.jsonl``, oldest first.

    Raises:
        UserError: if there is no such file, or it is something else.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        text = path.read_text()
        found = [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as results of an evaluation ({error}).") from None
    if not all(isinstance(results, dict) and "num_images" in results for results in found):
        raise UserError(f"{path} holds no results of an evaluation; expected a results.json of main_lpd.py --evaluate.")
    return [(run_name(path, results), results) for results in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m engine.evaluation.results_table",
        description="A Markdown table over several evaluations, published figures beside measured ones.",
    )
    parser.add_argument("results", nargs="+", type=Path, help="results.json, results.jsonl, or folders with the former")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    table = markdown_table([run for path in args.results for run in read_results(path)])
    print(table, end="")
    if args.output is not None:
        with atomic_write(args.output) as file:
            file.write(table.encode())


if __name__ == "__main__":
    exit_on_user_error(main)
