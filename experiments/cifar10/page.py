"""The page of the results: answers, tables and curves, from the JSON alone.

The figures are a list of rows, one per cell of the sweep: plain dicts with the fields of
:class:`experiments.cifar10.sweep.Cell` and what was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.cifar10.scales import ABLATION_STEPS, IMG_SIZE, NAMES, PUBLISHED_ABLATION, STRIDE
from util.plots import plot_curves

PICTURES = "images"  # folder beside the page
Rows = Sequence[dict[str, Any]]


def chosen(rows: Rows, *kinds: str) -> Rows:
    """The rows of these kinds of cells."""
    return [row for row in rows if row["kind"] in kinds]


def ablation(rows: Rows) -> Rows:
    """The locality-aware order with other thresholds, and the row of the table with the default ones."""
    steps = ("lpd", ABLATION_STEPS)
    found = [row for row in chosen(rows, "table", "ablation") if (row["order"], row["steps"]) == steps]
    return found if chosen(found, "ablation") else []


def distances(rows: Rows, order: str, steps: int) -> list[float]:
    """Fréchet distance of an order at a number of steps, over the seeds that were measured."""
    found = chosen(rows, "table", "repeat")
    return [row["frechet_distance"] for row in found if (row["order"], row["steps"]) == (order, steps)]


def spread(numbers: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for fewer than two."""
    return stdev(numbers) if len(numbers) > 1 else 0.0


def answers(rows: Rows) -> Iterator[tuple[str, str, bool]]:
    """(what was expected, what was found, whether it holds), as far as it has been measured."""
    few, many = distances(rows, "lpd", 20), distances(rows, "lpd", 256)
    if few and many:
        question = "Locality-aware, 20 steps within 5 % of the Fréchet distance at 256 steps"
        found = f"{mean(few):.3f} against {mean(many):.3f}, {mean(few) / mean(many) - 1:+.1%}"
        yield question, found, mean(few) <= 1.05 * mean(many)
    for steps, rival in itertools.product((32, 20, 16, 12, 8), ("random", "halton")):
        ours, theirs = distances(rows, "lpd", steps), distances(rows, rival, steps)
        if min(len(ours), len(theirs)) > 1:
            gain, noise = mean(theirs) - mean(ours), spread(ours) + spread(theirs)
            question = f"Locality-aware better than {NAMES[rival]} at {steps} steps by more than the spread"
            yield question, f"better by {gain:.3f}, spread {noise:.3f}", gain > noise
    found_at = {(row["repulsion"], row["proximity"]): row["frechet_distance"] for row in ablation(rows)}
    if PUBLISHED_ABLATION in found_at:
        behind, noise = found_at[PUBLISHED_ABLATION] - min(found_at.values()), spread(few)
        question = "Repulsion {} and proximity {:g} best, or behind by no more than the spread of seeds"
        yield question.format(*PUBLISHED_ABLATION), f"behind by {behind:.3f}, spread {noise:.3f}", behind <= noise


def table(heads: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """As Markdown."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(list(heads)) + "|", *lines[1:]])


def show(values: Sequence[float], form: str) -> str:
    """The mean, ± the standard deviation where there are several, or a dash where there is none."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}" if values else "–"


def pivot(rows: Rows, figure: str, form: str, down: str = "order", across: str = "steps") -> str:
    """A table of one figure by two other columns of the rows."""
    numbers: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        if row.get(figure) is not None:
            numbers.setdefault(row[down], {}).setdefault(row[across], []).append(row[figure])

    columns = sorted({column for line in numbers.values() for column in line}, reverse=across == "steps")
    lines = ([NAMES.get(name, name), *(show(line.get(c, []), form) for c in columns)] for name, line in numbers.items())
    return table((f"{down} \\ {across}", *columns), lines)


def page(results: dict[str, Any]) -> str:
    """The whole page as Markdown, in figures taken from ``results`` alone."""
    scale, data, environment, rows = (results[key] for key in ("settings", "data", "environment", "cells"))
    tokenizer, training, model, seconds = (results[key] for key in ("tokenizer", "training", "model", "stage_sec"))
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    stages = ", ".join(f"{name} {sec:.0f}" for name, sec in seconds.items())
    paragraphs = ["# Quality against steps, on photographs"]
    if scale["subset"] is not None:
        paragraphs += [f"**A test run with {scale['subset']} photos and tiny models: no figure here means anything.**"]
    paragraphs += [
        "Written by [`experiments/cifar10`](../experiments/cifar10/README.md) from the measurements; the questions and "
        "what counts as an answer were fixed before them.",
        table(
            ("expected", "found", ""),
            ((*texts, "**holds**" if holds else "**does not hold**") for *texts, holds in answers(rows)),
        ),
        f"{data['train']['images']:,} training and {data['test']['images']:,} test photos of {IMG_SIZE}×{IMG_SIZE} "
        f"pixels ({data['train']['source']}). {scale['num_images']:,} images per cell; ± is the standard deviation "
        f"over {len(scale['seeds'])} seeds of generation, where there are several, with one trained model. Tokenizer "
        f"of stride {STRIDE}: PSNR {tokenizer['psnr_db']:.2f} dB on the test photos, {tokenizer['codebook_share']:.1%} "
        f"of {tokenizer['tokenizer']['codebook_size']} codes in use. The classifier reads "
        f"{results['classifier']['test_accuracy']:.2%} of the test photos right. LPD: width {model['embed_dim']}, "
        f"depth {model['depth']}, {training['epochs']} epochs, final loss {training['final_loss']:.3f}. "
        f"{environment['device']}, Python {environment['python']}, {packages}; {results['date'][:10]}. "
        f"Seconds of the stages: {stages}.",
        "31 and 46 steps are the groups of those orders' own papers; at other steps all orders have the same groups.",
    ]
    reported = chosen(rows, "table", "repeat", "own")
    for title, found, figure, form in (
        ("Fréchet distance to the test photos, in the classifier's features", reported, "frechet_distance", ".3f"),
        ("Read as the class asked for", reported, "class_accuracy", ".1%"),
        (f"Seconds per image, batches of {scale['eval_bsz']:,}", reported, "sec_per_image", ".5f"),
        ("FID, one seed", chosen(rows, "fid"), "fid", ".2f"),
    ):
        if found:
            paragraphs += [f"## {title}", pivot(found, figure, form)]
    thresholds = pivot(ablation(rows), "frechet_distance", ".3f", "repulsion", "proximity")
    guidance = pivot(chosen(rows, "tuning"), "frechet_distance", ".2f", across="cfg")
    figures = {"frechet_distance": ".3f", "class_accuracy": ".1%"}
    floors = (
        (name, floor["extractor"], *(show([floor[f]] if f in floor else [], form) for f, form in figures.items()))
        for name, floor in results["floors"].items()
    )
    return "\n\n".join(
        [
            *paragraphs,
            f"![Quality against steps]({PICTURES}/cifar10_quality.png)",
            f"## Fréchet distance by thresholds, locality-aware, {ABLATION_STEPS} steps, one seed",
            thresholds,
            "## What is possible: real photos, and photos through the tokenizer",
            table(("photos", "features", "Fréchet distance", "read as their class"), floors),
            f"## Fréchet distance by guidance, {scale['tuning_images']:,} images, {scale['tuning_steps']} steps, seed "
            f"{scale['tuning_seed']}: the least was chosen for each order",
            guidance,
            f"![Training loss]({PICTURES}/cifar10_loss.png)",
            *(f"![Locality-aware, {n} steps]({PICTURES}/cifar10_samples_{n}.png)" for n in (256, 20)),
        ]
    ) + "\n"  # fmt: skip


def plot(results: dict[str, Any], folder: Path) -> None:
    """Fréchet distance against steps, a line per order; and the training loss."""
    curves, rows = {}, results["cells"]
    for order in dict.fromkeys(row["order"] for row in chosen(rows, "table")):
        found = {steps: distances(rows, order, steps) for steps in results["settings"]["steps"]}
        found = {steps: numbers for steps, numbers in found.items() if numbers}
        curves[NAMES[order]] = (list(found), [*map(mean, found.values())], [*map(spread, found.values())])
    plot_curves(folder / "cifar10_quality.png", curves, "decoding steps", "Fréchet distance", log_x=True)
    lines = results["training"]["loss_curve"]
    loss = [line["epoch"] for line in lines], [line["loss"] for line in lines]
    plot_curves(folder / "cifar10_loss.png", {"training loss": loss}, "epoch", "cross-entropy per token, nats")
