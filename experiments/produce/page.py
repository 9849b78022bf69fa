"""The page of the results: where locality-aware orders win, tie and lose, and what may explain it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.cells import NAMES
from experiments.pages import (
    PICTURES,
    Rows,
    ablation,
    chosen,
    conditions,
    disclaimer,
    distances,
    floors,
    pivot,
    plot_quality,
    spread,
    table,
)
from experiments.produce.contexts import FIGURES, context_rows, plot_contexts
from experiments.produce.naming import GRIDS, count_right
from util.plots import plot_curves

RIVALS = ("random", "halton", "raster")


def verdict(ours: list[float], theirs: list[float]) -> str:
    """Of Fréchet distances over seeds: a difference within both standard deviations together is a tie."""
    if min(len(ours), len(theirs)) < 2:
        return "–"
    gain, noise = mean(theirs) - mean(ours), spread(ours) + spread(theirs)
    word = "ties" if abs(gain) <= noise else "**wins**" if gain > 0 else "**loses**"
    return f"{word} {-gain:+.2f} ± {noise:.2f}"


def verdicts(rows: Rows, steps: list[int]) -> Iterator[tuple[str, ...]]:
    """(model, rival, verdict at each number of steps) of the locality-aware order."""
    for model in dict.fromkeys(row["model"] for row in chosen(rows, "table")):
        for rival in RIVALS:
            found = [
                verdict(distances(rows, "lpd", number, model), distances(rows, rival, number, model))
                for number in steps
            ]
            if set(found) != {"–"}:
                yield model, NAMES[rival], *found


def page(results: dict[str, Any]) -> str:
    """The whole page as Markdown, in figures taken from ``results`` alone."""
    scale, rows, pictures = results["settings"], results["cells"], f"{PICTURES}/{results['experiment']}"
    grid = scale["img_size"] // scale["stride"]
    paragraphs = [
        f"# Photographs of fruit and vegetables in {grid}×{grid} tokens: which order, how many steps",
        *disclaimer(results),
        "Written by [`experiments/produce`](../experiments/produce/README.md) from the measurements.",
        _about(results),
        "## Locality-aware orders against others",
        "Difference of the Fréchet distance to that of the other order, below zero where the locality-aware order is "
        "better; ± is the sum of both standard deviations over seeds, and a difference within it is a tie.",
        table(("model", "against", *scale["steps"]), verdicts(rows, scale["steps"])),
        *_figures(results),
        *_training_length(results),
        *_thresholds(results),
        *_contexts(results),
        *_likelihood(results),
        *_losses(results),
        *_neighbours(results),
        "## What is possible: real photos, and photos through the tokenizer",
        floors(results),
        f"## Fréchet distance by guidance, {scale['tuning_images']:,} images, {scale['tuning_steps']} steps, seed "
        f"{scale['tuning_seed']}: the least was chosen for each model and order",
    ]
    for model in _models(rows, "tuning"):
        tuned = chosen(rows, "tuning", model=model)
        paragraphs += [f"### {model}", pivot(tuned, "frechet_distance", ".2f", across="cfg")]
    paragraphs += ["## Pictures"]
    steps = scale["tuning_steps"]
    if chosen(rows, "table", order="lpd", model=_first(results), steps=steps):
        paragraphs += [f"![Locality-aware, {steps} steps]({pictures}_samples_{steps}.png)"]
    paragraphs += _unlabelled(results)
    return "\n\n".join(paragraphs) + "\n"


def _first(results: dict[str, Any]) -> str:
    """The model whose pictures, thresholds and times are shown."""
    return results["settings"]["models"][0]["training"]


def _models(rows: Rows, *kinds: str) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in chosen(rows, *kinds)))


def _about(results: dict[str, Any]) -> str:
    scale, data, tokenizer, model = (results[key] for key in ("settings", "data", "tokenizer", "model"))
    trained = "; ".join(
        f"`{name}` {' '.join(scale['trainings'][name])}, {training['epochs']} epochs"
        for name, training in results["trainings"].items()
    )
    return (
        f"{data['train']['images']:,} training and {data['test']['images']:,} test photos of {scale['img_size']}×"
        f"{scale['img_size']} pixels ({data['train']['source']}). {scale['num_images']:,} images per cell, equally "
        "many of each class, scored against training photos with equally many of each class; ± is the standard "
        f"deviation over {len(scale['seeds'])} seeds of generation, where there are several, with one trained model. "
        f"Tokenizer of stride {scale['stride']}: PSNR {tokenizer['psnr_db']:.2f} dB on test photos, "
        f"{tokenizer['codebook_share']:.1%} of {tokenizer['tokenizer']['codebook_size']} codes in use. The classifier "
        f"reads {results['classifier']['test_accuracy']:.1%} of the test photos right (mean over classes). "
        f"Models of width {model['embed_dim']}, depth {model['depth']}: {trained}. {conditions(results)}"
    )


def _figures(results: dict[str, Any]) -> Iterator[str]:
    """Tables of the last checkpoints, and their curves."""
    rows = results["cells"]
    for training in results["trainings"]:
        reported = chosen(rows, "table", "repeat", "own", model=training)
        if reported:
            yield f"## `{training}`: Fréchet distance in the classifier's features"
            yield pivot(reported, "frechet_distance", ".2f")
            yield f"![Quality against steps]({PICTURES}/{results['experiment']}_quality_{training}.png)"
            yield f"## `{training}`: read as the class asked for"
            yield pivot(reported, "class_accuracy", ".1%")
    first = chosen(rows, "table", model=_first(results))
    yield f"## Seconds per image, batches of {results['settings']['eval_bsz']:,}, decoding of pixels included"
    yield pivot(first, "sec_per_image", ".4f")


def _training_length(results: dict[str, Any]) -> Iterator[str]:
    """Fréchet distance of all checkpoints at the numbers of steps that the earlier ones were evaluated at."""
    rows = results["cells"]
    early = [row for row in chosen(rows, "table") if row["epoch"] is not None]
    for steps in sorted({row["steps"] for row in early}, reverse=True):
        yield f"## Against training length: Fréchet distance, {steps} steps"
        orders = {row["order"] for row in early}
        found = [row for row in chosen(rows, "table", "repeat", steps=steps) if row["order"] in orders]
        yield pivot(found, "frechet_distance", ".2f", "model", "order")


def _thresholds(results: dict[str, Any]) -> Iterator[str]:
    for steps in results["settings"]["ablation_steps"]:
        found = ablation(results["cells"], steps)
        if found:
            yield f"## Fréchet distance by repulsion and proximity, locality-aware, {steps} steps, one seed"
            yield pivot(found, "frechet_distance", ".2f", "repulsion", "proximity")


def _contexts(results: dict[str, Any]) -> Iterator[str]:
    contexts = results["contexts"]
    if contexts is None:
        return
    yield "## Contexts: what is known around a token"
    yield (
        "Means over the decoding steps from the second on. *Known neighbours*: share of the eight neighbours of the "
        "tokens asked for that are known. *Nearest*: distance to the nearest known token. *Clustering*: share of the "
        "neighbours of known tokens that are known. *At random*: share of random contexts of the same size that are "
        "clustered more, equals counted half; where it is near 0, a model trained on random orders has hardly seen "
        "such contexts."
    )
    rows = (
        (NAMES[order], steps, *(f"{value:.3f}" for value in values)) for order, steps, *values in context_rows(contexts)
    )
    yield table(("order", "steps", "known neighbours", "nearest", "clustering", "at random"), rows)
    for figure in FIGURES:
        yield f"![{figure.replace('_', ' ').capitalize()}]({PICTURES}/{results['experiment']}_{figure}.png)"


def _likelihood(results: dict[str, Any]) -> Iterator[str]:
    for model, cells in results["likelihood"].items():
        yield f"## `{model}`: bits per token of the test photos, guidance left out"
        yield pivot([cell | {"bits": cell["bits_per_token"]["mean"]} for cell in cells], "bits", ".3f")


def _losses(results: dict[str, Any]) -> Iterator[str]:
    yield "## Losses, nats per token; the test loss of every training is on random orders"
    rows = []
    for name, training in results["trainings"].items():
        measured = [line for line in training["loss_curve"] if "val_loss" in line]
        if measured:
            least = min(measured, key=lambda line: line["val_loss"])
            last = measured[-1]
            figures = last["loss"], last["val_loss"], least["val_loss"]
            rows.append((name, *(f"{figure:.3f}" for figure in figures), f"{least['epoch']:.0f}"))
    yield table(("training", "last training loss", "last test loss", "least test loss", "at epoch"), rows)
    yield f"![Losses]({PICTURES}/{results['experiment']}_loss.png)"


def _neighbours(results: dict[str, Any]) -> Iterator[str]:
    if not results["neighbours"]:
        return
    yield "## Are the samples copies?"
    yield (
        "Median distance to the nearest training photo, of samples and of test photos (the data set shows many things "
        "several times, from one shop); *nearer*: share of samples nearer to a training photo than 95 % of the test "
        "photos are. Pixels: root mean square of grey levels."
    )
    rows = (
        (
            name,
            space,
            f"{found[space]['samples']:.2f}",
            f"{found[space]['held_out']:.2f}",
            f"{found[space]['nearer']:.1%}",
        )
        for name, found in results["neighbours"].items()
        for space in ("pixels", "features")
    )
    yield table(("model", "space", "samples", "test photos", "nearer"), rows)
    yield "The run's folder `neighbours` shows both side by side; the photos are not part of this repository."


def _unlabelled(results: dict[str, Any]) -> Iterator[str]:
    """Pictures to be named, and how many were."""
    found = results["unlabelled"]
    if found is None:
        return
    drawn = f"{found['steps']} steps, guidance {found['cfg']:g}, temperature {found['temperature']:g}"
    yield f"One picture of each class by `{found['model']}`, in mixed order; seed {found['seed']}, {drawn}:"
    yield f"![Unlabelled pictures]({PICTURES}/{results['experiment']}_{GRIDS['pictures']})"
    askings = found["named"]
    if askings:
        yield "Named right, of these, of test photos of the same size, and of these photos' reconstructions:"
        rows = [
            (asking["who"], *(_share(count_right(found, asking, kind), len(found[kind])) for kind in GRIDS))
            for asking in askings
        ]
        yield table(("by", *GRIDS), rows)
    lines = []
    for number, name in found["pictures"].items():
        given = [asking["pictures"][number] for asking in askings if "pictures" in asking]
        wrong = dict.fromkeys(other for other in given if other != name)
        lines.append(f"{number} {name}" + (f" (named {', '.join(wrong)})" if wrong else ""))
    yield f"<details><summary>What they are</summary>{', '.join(lines)}</details>"


def _share(count: int | None, total: int) -> str:
    return "–" if count is None else f"{count} of {total}"


def plot(results: dict[str, Any], folder: Path) -> None:
    """Fréchet distance against steps for every training, losses, and contexts."""
    title, steps = results["experiment"], results["settings"]["steps"]
    curves = {}
    for name, training in results["trainings"].items():
        plot_quality(folder / f"{title}_quality_{name}.png", results["cells"], steps, name)
        for loss, label in (("loss", "training"), ("val_loss", "test")):
            lines = [line for line in training["loss_curve"] if loss in line]
            curves[f"{name}, {label}"] = [line["epoch"] for line in lines], [line[loss] for line in lines]
    plot_curves(folder / f"{title}_loss.png", curves, "epoch", "cross-entropy per token, nats")
    at = results["settings"]["tuning_steps"]
    labels = ("share of neighbours known", "distance to the nearest known", "share of neighbours of known tokens known")
    for figure, label in zip(FIGURES, labels, strict=True):
        if results["contexts"] is not None:
            path = folder / f"{title}_{figure}.png"
            plot_contexts(path, results["contexts"], figure, label, ("lpd", *RIVALS), at)
