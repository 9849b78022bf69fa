"""The page of the results: answers, tables and curves, from the JSON alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.cells import NAMES
from experiments.cifar10.scales import ABLATION_STEPS, IMG_SIZE, PUBLISHED_ABLATION, STRIDE
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
from util.plots import plot_curves


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
    found_at = {(row["repulsion"], row["proximity"]): row["frechet_distance"] for row in ablation(rows, ABLATION_STEPS)}
    if PUBLISHED_ABLATION in found_at:
        behind, noise = found_at[PUBLISHED_ABLATION] - min(found_at.values()), spread(few)
        question = "Repulsion {} and proximity {:g} best, or behind by no more than the spread of seeds"
        yield question.format(*PUBLISHED_ABLATION), f"behind by {behind:.3f}, spread {noise:.3f}", behind <= noise


def page(results: dict[str, Any]) -> str:
    """The whole page as Markdown, in figures taken from ``results`` alone."""
    scale, data, rows = (results[key] for key in ("settings", "data", "cells"))
    shown = (256, scale["tuning_steps"])
    tokenizer, model, training = results["tokenizer"], results["model"], results["trainings"]["lpd"]
    paragraphs = [
        "# Quality against steps, on photographs",
        *disclaimer(results),
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
        + conditions(results),
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
    thresholds = pivot(ablation(rows, ABLATION_STEPS), "frechet_distance", ".3f", "repulsion", "proximity")
    return "\n\n".join(
        [
            *paragraphs,
            f"![Quality against steps]({PICTURES}/cifar10_quality.png)",
            f"## Fréchet distance by thresholds, locality-aware, {ABLATION_STEPS} steps, one seed",
            thresholds,
            "## What is possible: real photos, and photos through the tokenizer",
            floors(results),
            f"## Fréchet distance by guidance, {scale['tuning_images']:,} images, {scale['tuning_steps']} steps, seed "
            f"{scale['tuning_seed']}: the least was chosen for each order",
            pivot(chosen(rows, "tuning"), "frechet_distance", ".2f", across="cfg"),
            f"![Training loss]({PICTURES}/cifar10_loss.png)",
            *(f"![Locality-aware, {n} steps]({PICTURES}/cifar10_samples_{n}.png)" for n in shown),
        ]
    ) + "\n"  # fmt: skip


def plot(results: dict[str, Any], folder: Path) -> None:
    """Fréchet distance against steps, a line per order; and the training loss."""
    plot_quality(folder / "cifar10_quality.png", results["cells"], results["settings"]["steps"])
    lines = results["trainings"]["lpd"]["loss_curve"]
    loss = [line["epoch"] for line in lines], [line["loss"] for line in lines]
    plot_curves(folder / "cifar10_loss.png", {"training loss": loss}, "epoch", "cross-entropy per token, nats")
