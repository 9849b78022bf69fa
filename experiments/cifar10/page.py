"""The page of the results: tables, plots and the answers to the experiment's questions, from the JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.cifar10.scales import ABLATION_STEPS, IMG_SIZE, PUBLISHED_ABLATION, STRIDE
from experiments.cifar10.sweep import DEFAULT_PROXIMITY, DEFAULT_REPULSION

PICTURES = "images"  # folder beside the page
NAMES = {
    "lpd": "locality-aware",
    "random": "random",
    "halton": "Halton",
    "raster": "raster",
    "par": "region-parallel",
    "zipar": "diagonal",
    "nar": "neighbouring",
    "lpd_near_only": "near context only",
    "lpd_far_only": "far apart only",
}
FORMS = {"frechet_distance": ".3f", "class_accuracy": ".1%", "sec_per_image": ".5f", "fid": ".2f"}

Results = dict[str, Any]


def values(
    results: Results, figure: str, order: str, steps: int, kinds: Sequence[str] = ("table", "repeat")
) -> list[float]:
    """One figure of an order at a number of steps, over the seeds that were measured."""
    return [
        row[figure]
        for row in results["cells"]
        if row["kind"] in kinds and (row["order"], row["steps"]) == (order, steps) and row.get(figure) is not None
    ]


def spread(numbers: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for fewer than two."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def quality_within_five_percent(results: Results) -> tuple[str, bool | None]:
    """Does the locality-aware order at 20 steps stay within 5 % of its distance at 256 steps?"""
    few, many = (values(results, "frechet_distance", "lpd", steps) for steps in (20, 256))
    question = "Locality-aware, 20 steps within 5 % of the Fréchet distance at 256 steps"
    if not few or not many:
        return f"{question}: not measured", None
    ratio = statistics.mean(few) / statistics.mean(many)
    detail = f"{statistics.mean(few):.3f} against {statistics.mean(many):.3f}, {ratio - 1:+.1%}"
    return f"{question}: {detail}", ratio <= 1.05


def better_than_rivals(results: Results) -> list[tuple[str, bool | None]]:
    """Is it better than random and Halton at 8 to 32 steps, by more than both standard deviations together?"""
    answers: list[tuple[str, bool | None]] = []
    for steps in sorted((s for s in results["settings"]["steps"] if 8 <= s <= 32), reverse=True):
        ours = values(results, "frechet_distance", "lpd", steps)
        for rival in ("random", "halton"):
            theirs = values(results, "frechet_distance", rival, steps)
            question = f"Locality-aware better than {NAMES[rival]} at {steps} steps by more than the spread"
            if min(len(ours), len(theirs)) < 2:
                answers.append((f"{question}: not measured with two seeds", None))
                continue
            gain, noise = statistics.mean(theirs) - statistics.mean(ours), spread(ours) + spread(theirs)
            answers.append((f"{question}: better by {gain:.3f}, spread {noise:.3f}", gain > noise))
    return answers


def ablation(results: Results) -> dict[tuple[int, float], float]:
    """Fréchet distance by (repulsion, proximity), the first seed's."""
    found = {
        (row["repulsion"], row["proximity"]): row["frechet_distance"]
        for row in results["cells"]
        if row["kind"] == "ablation"
    }
    default = values(results, "frechet_distance", "lpd", ABLATION_STEPS, ("table",))
    return found | {(DEFAULT_REPULSION, DEFAULT_PROXIMITY): default[0]} if default and found else found


def published_thresholds_best(results: Results) -> tuple[str, bool | None]:
    """Are the paper's thresholds the best ones, or no further from them than two seeds are from each other?"""
    distances = ablation(results)
    question = "Repulsion {} and proximity {:g} best at 20 steps".format(*PUBLISHED_ABLATION)
    if PUBLISHED_ABLATION not in distances:
        return f"{question}: not measured", None
    best = min(distances, key=lambda pair: distances[pair])
    behind = distances[PUBLISHED_ABLATION] - distances[best]
    noise = spread(values(results, "frechet_distance", "lpd", ABLATION_STEPS))
    return (
        f"{question}, or behind by no more than the spread of seeds: the best is repulsion {best[0]}, proximity "
        f"{best[1]:g}, the published ones are behind by {behind:.3f}, spread {noise:.3f}",
        behind <= noise,
    )


def table(heads: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """As Markdown."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(list(heads)) + "|", *lines[1:]])


def show(number: float | None, figure: str) -> str:
    """A number in the form of its figure, or a dash where there is none."""
    return "–" if number is None else format(number, FORMS[figure])


def answers_table(results: Results) -> str:
    """Every expectation with what was found."""
    answers = [quality_within_five_percent(results), *better_than_rivals(results), published_thresholds_best(results)]
    words = {True: "**holds**", False: "**does not hold**", None: "–"}
    return table(("expected", "found", ""), ((*text.split(": ", 1), words[holds]) for text, holds in answers))


def quality_table(results: Results, figure: str, kinds: Sequence[str] = ("table", "repeat")) -> str:
    """Orders × steps of one figure, mean ± standard deviation where there are several seeds."""

    def cell(order: str, steps: int) -> str:
        numbers = values(results, figure, order, steps, kinds)
        deviation = f" ± {show(spread(numbers), figure)}" if len(numbers) > 1 else ""
        return show(statistics.mean(numbers) if numbers else None, figure) + deviation

    steps, orders = results["settings"]["steps"], results["settings"]["orders"]
    return table(("order", *steps), ((NAMES[order], *(cell(order, count) for count in steps)) for order in orders))


def own_steps_table(results: Results) -> str:
    heads = ("order", "own steps", "Fréchet distance", "class accuracy", "seconds per image")
    figures = ("frechet_distance", "class_accuracy", "sec_per_image")
    rows = [row for row in results["cells"] if row["kind"] == "own"]
    return table(heads, ((NAMES[r["order"]], r["steps"], *(show(r[name], name) for name in figures)) for r in rows))


def ablation_table(results: Results) -> str:
    found = ablation(results)
    repulsions, proximities = (sorted(set(thresholds)) for thresholds in zip(*found, strict=True))

    def cells(repulsion: int) -> list[str]:
        return [show(found.get((repulsion, proximity)), "frechet_distance") for proximity in proximities]

    heads = ("repulsion", *(f"proximity {proximity:g}" for proximity in proximities))
    return table(heads, ((repulsion, *cells(repulsion)) for repulsion in repulsions))


def guidance_table(results: Results) -> str:
    cfgs, rows = results["settings"]["cfgs"], []
    tuned = {(row["order"], row["cfg"]): row["frechet_distance"] for row in results["cells"] if row["kind"] == "tuning"}
    for order in results["settings"]["orders"]:
        found = {cfg: tuned[order, cfg] for cfg in cfgs if (order, cfg) in tuned}
        best = f"{min(found, key=lambda cfg: found[cfg]):g}" if len(found) == len(cfgs) else "–"
        rows.append((NAMES[order], *(f"{found[cfg]:.2f}" if cfg in found else "–" for cfg in cfgs), best))
    return table(("order", *(f"{cfg:g}" for cfg in cfgs), "chosen"), rows)


def floors_table(results: Results) -> str:
    heads = ("scored against the test photos", "features", "Fréchet distance", "read as their class")
    names = {"train": "training photos", "reconstructed": "test photos through the tokenizer"}
    rows = []
    for key, floor in results["floors"].items():
        figures = (show(floor.get(name), name) for name in ("frechet_distance", "class_accuracy"))
        rows.append((names[key.partition("_")[2]], floor["extractor"], *figures))
    return table(heads, rows)


def page(results: Results) -> str:
    """The whole page as Markdown, in figures taken from ``results`` alone."""
    return "\n\n".join([*_introduction(results), *_measurements(results), *_training(results)]) + "\n"


def _introduction(results: Results) -> list[str]:
    """Paragraphs: what was expected, what was found, under which conditions."""
    scale, data, environment = results["settings"], results["data"], results["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    warning = f"**A test run with {scale['subset']} photos and tiny models: no figure here means anything.**"
    return [
        "# Quality against steps, on photographs",
        *([] if scale["subset"] is None else [warning]),
        "Written by [`experiments/cifar10`](../experiments/cifar10/README.md) from the measurements; the questions and "
        "what counts as an answer were fixed before them.",
        answers_table(results),
        f"{data['train']['images']:,} training and {data['test']['images']:,} test photos of {IMG_SIZE}×{IMG_SIZE} "
        f"pixels ({data['train']['source']}). {scale['num_images']:,} images per cell; ± is the standard deviation "
        f"over {len(scale['seeds'])} seeds of generation, where there are several, with one trained model. "
        f"{environment['device']}, Python {environment['python']}, {packages}; {results['date'][:10]}.",
    ]


def _measurements(results: Results) -> list[str]:
    scale, kinds = results["settings"], {row["kind"] for row in results["cells"]}
    paragraphs = [
        "## Fréchet distance",
        "Between generated images and the test photos, in the features of the classifier below; lower is better.",
        quality_table(results, "frechet_distance"),
        f"![Quality against steps]({PICTURES}/cifar10_quality.png)",
        "## Read as the class asked for",
        quality_table(results, "class_accuracy"),
        "## Seconds per image",
        f"Generating and decoding, batches of {scale['eval_bsz']:,}, decode path `{results['decode_path']}`.",
        quality_table(results, "sec_per_image", ("table",)),
    ]
    if "own" in kinds:
        text = "All orders are cut into the same group sizes above. These take the groups of their own papers:"
        paragraphs += [text, own_steps_table(results)]
    if "fid" in kinds:
        paragraphs += ["## FID", "Inception's features, one seed.", quality_table(results, "fid", ("fid",))]
    if "ablation" in kinds:
        text = f"Fréchet distance of the locality-aware order at {ABLATION_STEPS} steps, one seed."
        paragraphs += ["## Repulsion and proximity", text, ablation_table(results)]
    return [
        *paragraphs,
        "## What is possible",
        floors_table(results),
        "## Guidance",
        f"Tuned once per order: the scale of least Fréchet distance over {scale['tuning_images']:,} images at "
        f"{scale['tuning_steps']} steps, with seed {scale['tuning_seed']}, which no other cell has.",
        guidance_table(results),
    ]


def _training(results: Results) -> list[str]:
    tokenizer, training, model, seconds = (results[key] for key in ("tokenizer", "training", "model", "stage_sec"))
    stages = ", ".join(f"{name.replace('_', ' ')} {sec:.0f}" for name, sec in seconds.items())
    return [
        "## Training",
        f"- Tokenizer, stride {STRIDE}: PSNR {tokenizer['psnr_db']:.2f} dB on "
        f"the test photos, {tokenizer['codebook_share']:.1%} of {tokenizer['tokenizer']['codebook_size']} codes in use "
        f"(perplexity {tokenizer['codebook_perplexity']:.0f}).\n"
        f"- Classifier: reads {results['classifier']['test_accuracy']:.2%} of the test photos right.\n"
        f"- LPD: width {model['embed_dim']}, depth {model['depth']}; final loss {training['final_loss']:.3f}, "
        f"{training['images_per_sec']:,.0f} images per second in training (median).\n"
        f"- Seconds of the stages: {stages}; {sum(seconds.values()):.0f} in all.",
        f"![Training loss]({PICTURES}/cifar10_loss.png)",
        "## Samples",
        "Locality-aware, 256 steps:",
        f"![256 steps]({PICTURES}/cifar10_samples_256.png)",
        "Locality-aware, 20 steps:",
        f"![20 steps]({PICTURES}/cifar10_samples_20.png)",
    ]


def plot_quality(results: Results, path: Path) -> None:
    """Fréchet distance and class accuracy against steps, a line per order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, name, label in (
        (axes[0], "frechet_distance", "Fréchet distance"),
        (axes[1], "class_accuracy", "read as the class asked for"),
    ):
        for order in results["settings"]["orders"]:
            found = {steps: values(results, name, order, steps) for steps in results["settings"]["steps"]}
            found = {steps: numbers for steps, numbers in found.items() if numbers}
            means = [statistics.mean(numbers) for numbers in found.values()]
            bars = [spread(numbers) for numbers in found.values()]
            width = 2.5 if order == "lpd" else 1.2
            axis.errorbar(list(found), means, bars, marker="o", markersize=3, linewidth=width, label=NAMES[order])
        axis.set_xscale("log", base=2)
        axis.set_xticks(results["settings"]["steps"], map(str, results["settings"]["steps"]))
        axis.set_xlabel("decoding steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
