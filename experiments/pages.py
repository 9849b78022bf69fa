"""What the pages of the experiments have in common: choosing among the rows of cells, and tables of them.

Rows are plain dicts with the fields of :class:`experiments.cells.Cell`, the name of the model, and what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.cells import NAMES
from util.plots import plot_curves

PICTURES = "images"  # folder beside the page
Rows = Sequence[dict[str, Any]]


def chosen(rows: Rows, *kinds: str, **values: Any) -> Rows:
    """The rows of these kinds of cells in which these fields have these values."""
    return [row for row in rows if row["kind"] in kinds and all(row[name] == value for name, value in values.items())]


def ablation(rows: Rows, steps: int) -> Rows:
    """The locality-aware order with other thresholds, and the row of the table with the default ones."""
    found = chosen(rows, "ablation", order="lpd", steps=steps)
    return [*chosen(rows, "table", order="lpd", steps=steps, model=found[0]["model"]), *found] if found else []


def distances(rows: Rows, order: str, steps: int, model: str = "lpd") -> list[float]:
    """Fréchet distance of an order at a number of steps, over the seeds that were measured."""
    return [row["frechet_distance"] for row in chosen(rows, "table", "repeat", order=order, steps=steps, model=model)]


def spread(numbers: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for fewer than two."""
    return stdev(numbers) if len(numbers) > 1 else 0.0


def table(heads: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """As Markdown."""
    heads = list(heads)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def show(values: Sequence[float], form: str) -> str:
    """The mean, ± the standard deviation where there are several, or a dash where there is none."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}" if values else "–"


def pivot(rows: Rows, figure: str, form: str, down: str = "order", across: str = "steps") -> str:
    """A table of one figure by two other columns of the rows; orders by their readable names."""
    numbers: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        if row.get(figure) is not None:
            numbers.setdefault(row[down], {}).setdefault(row[across], []).append(row[figure])

    columns = sorted({column for line in numbers.values() for column in line}, reverse=across == "steps")
    rows_named, columns_named = (
        [NAMES[value] if axis == "order" else value for value in values]
        for axis, values in ((down, numbers), (across, columns))
    )
    lines = ([show(line.get(column, []), form) for column in columns] for line in numbers.values())
    cells = ([name, *line] for name, line in zip(rows_named, lines, strict=True))
    return table((f"{down} \\ {across}", *columns_named), cells)


def floors(results: dict[str, Any]) -> str:
    """The scores of real photos, and of photos through the tokenizer."""
    figures = {"frechet_distance": ".3f", "class_accuracy": ".1%"}
    rows = (
        (name, floor["extractor"], *(show([floor[f]] if f in floor else [], form) for f, form in figures.items()))
        for name, floor in results["floors"].items()
    )
    return table(("photos", "features", "Fréchet distance", "read as their class"), rows)


def conditions(results: dict[str, Any]) -> str:
    """Machine, versions, date and how long the stages took."""
    environment = results["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    stages = ", ".join(f"{name} {sec:.0f}" for name, sec in results["stage_sec"].items())
    return (
        f"{environment['device']}, Python {environment['python']}, {packages}; {results['date'][:10]}. "
        f"Seconds of the stages: {stages}."
    )


def disclaimer(results: dict[str, Any]) -> Iterator[str]:
    """A page begins so where its figures mean nothing."""
    subset = results["settings"]["subset"]
    if subset is not None:
        yield f"**A test run with {subset} photos and tiny models: no figure here means anything.**"


def plot_quality(path: Path, rows: Rows, steps: Sequence[int], model: str = "lpd") -> None:
    """Fréchet distance of a model against steps, a line per order."""
    curves = {}
    for order in dict.fromkeys(row["order"] for row in chosen(rows, "table", model=model)):
        found = {number: distances(rows, order, number, model) for number in steps}
        found = {number: numbers for number, numbers in found.items() if numbers}
        curves[NAMES[order]] = (list(found), [*map(mean, found.values())], [*map(spread, found.values())])
    plot_curves(path, curves, "decoding steps", "Fréchet distance", log_x=True)
