"""A Markdown table over several evaluations, published figures beside measured ones.

python -m engine.evaluation.results_table runs/eval/*/results.json --output docs/results.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from util.cli import Parser, exit_on_user_error
from util.errors import UserError, reading
from util.files import atomic_write, check_output_file
from util.readers import read_json, read_json_lines

# Column: where its value stands in results.json, and its format.
COLUMNS = {
    "order": ("settings.order", ""),
    "steps": ("settings.generation_steps", "d"),
    "guidance": ("settings.cfg", "g"),
    "checkpoint": ("record.pretrained_ckpt.path", ""),
    "EMA": ("record.ema", ""),
    "images": ("num_images", "d"),
    "FID, published": ("record.expected.fid", ".2f"),
    "FID": ("fid", ".2f"),
    "Fréchet distance": ("frechet_distance", ".2f"),
    "IS, published": ("record.expected.inception_score", ".1f"),
    "IS": ("inception_score", ".1f"),
    "right class": ("class_accuracy", ".1%"),
    "sFID": ("sfid", ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "latency s, published": ("record.expected.latency_s", ".3f"),
    "latency s": ("latency_s", ".4f"),
    "images/s, published": ("record.expected.images_per_sec", ".1f"),
    "images/s": ("throughput_images_per_sec", ".1f"),
    "s/image": ("sec_per_image", ".4f"),
    "images/s with scoring": ("images_per_sec", ".1f"),
    "features": ("extractor.name", ""),
    "statistics": ("reference.path", ""),
    "device": ("environment.device", ""),
}
Row = dict[str, str]  # cells by column; what a run does not have is left out


def _value(results: Any, keys: str) -> Any:
    """The value at dotted keys; None where the path ends early."""
    for key in keys.split("."):
        results = results.get(key) if isinstance(results, dict) else None
    return results


def row_of(folder: Path, results: dict[str, Any]) -> Row:
    """A run, named after its recipe and what was changed of it, or after its folder."""
    recipe, changes = _value(results, "record.recipe"), _value(results, "record.changed") or {}
    changed_recipe = [recipe, *(f"{flag} {value}" for flag, value in changes.items())]
    row = {"run": folder.absolute().name if recipe is None else ", ".join(changed_recipe)}
    for column, (keys, form) in COLUMNS.items():
        if (value := _value(results, keys)) is not None:
            row[column] = format(value, form)
    if "FID" in row:
        row.pop("Fréchet distance", None)  # the same number
    if (epoch := _value(results, "record.epoch")) is not None:
        row["checkpoint"] = f"epoch {epoch}"
    elif "checkpoint" in row:
        file = Path(row["checkpoint"])
        row["checkpoint"] = f"{file.parent.name}/{file.name} ({results['record']['pretrained_ckpt']['sha256'][:8]})"
    if "EMA" in row:
        row["EMA"] = "yes" if _value(results, "record.ema") else "no"
    if "statistics" in row:
        row["statistics"] = f"{Path(row['statistics']).name} ({results['reference']['sha256'][:8]})"
    if (processes := _value(results, "environment.world_size")) != 1 and "device" in row:
        row["device"] = f"{processes} × {row['device']}"
    return row


def results_file(path: Path) -> Path:
    """The file of results that a path names: itself, or that of a folder."""
    return path / "results.json" if path.is_dir() else path


def load_results(path: Path) -> list[dict[str, Any]]:
    """The results of a ``results.json``, or of a folder with one; all of a ``results.jsonl``, oldest first.

    Raises:
        UserError: if there is no such file, or it is something else.
    """
    path = results_file(path)
    runs = read_json_lines(path, "num_images") if path.suffix == ".jsonl" else [read_json("results", path)]
    if not runs or not all(isinstance(results, dict) and "num_images" in results for results in runs):
        raise UserError(f"{path} holds no results of an evaluation; expected a results.json of main_lpd.py --evaluate.")
    return runs


def read_results(path: Path) -> list[Row]:
    """The table's rows of :func:`load_results`."""
    folder = path if path.is_dir() else path.parent
    runs = load_results(path)
    with reading("results", results_file(path)):
        return [row_of(folder, results) for results in runs]


def markdown_table(rows: list[Row]) -> str:
    """One line per run; a column in which no run has anything is left out."""
    columns = [column for column in ("run", *COLUMNS) if any(column in row for row in rows)]
    rules = ["--:" if COLUMNS.get(column, ("", ""))[1] else "---" for column in columns]
    lines = [columns, rules, *([row.get(column, "–") for column in columns] for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)


def main() -> None:
    parser = Parser(
        prog="python -m engine.evaluation.results_table",
        description="A Markdown table over several evaluations, published figures beside measured ones.",
    )
    parser.add_argument("results", nargs="+", type=Path, help="results.json, results.jsonl, or folders with the former")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    if args.output is not None:
        check_output_file(args.output)
    table = markdown_table([row for path in args.results for row in read_results(path)])
    print(table, end="")
    if args.output is not None:
        with atomic_write(args.output) as file:
            file.write(table.encode())


if __name__ == "__main__":
    exit_on_user_error(main)
