"""The page of the results: tables, plots and the answers to the experiment's questions, from the JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.cifar10.settings import ABLATION_STEPS, IMG_SIZE, PUBLISHED_ABLATION, STRIDE
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

Row = dict[str, Any]
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


def spread(numbers: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for fewer than two."""
    return statistics.stdev(numbers) if len(numbers) > 1 else None


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
            spreads = spread(ours), spread(theirs)
            if spreads[0] is None or spreads[1] is None:
                answers.append((f"{question}: not measured with two seeds", None))
                continue
            gain, noise = statistics.mean(theirs) - statistics.mean(ours), spreads[0] + spreads[1]
            answers.append((f"{question}: better by {gain:.3f}, spread {noise:.3f}", gain > noise))
    return answers


def ablation(results: Results) -> dict[tuple[int, float], float]:
    """Fréchet distance by (repulsion, proximity), the first seed's."""
    found = {
        (row["repulsion"], row["proximity"]): row["frechet_distance"]
        for row in results["cells"]
        if row["kind"] == "ablation"
    }
    default = [
        row["frechet_distance"]
        for row in results["cells"]
        if (row["kind"], row["order"], row["steps"]) == ("table", "lpd", ABLATION_STEPS)
    ]
    return found | {(DEFAULT_REPULSION, DEFAULT_PROXIMITY): default[0]} if default and found else found


def published_thresholds_best(results: Results) -> tuple[str, bool | None]:
    """Are the paper's thresholds the best ones, or no further from them than two seeds are from each other?"""
    distances = ablation(results)
    question = "Repulsion {} and proximity {:g} best at 20 steps".format(*PUBLISHED_ABLATION)
    if PUBLISHED_ABLATION not in distances:
        return f"{question}: not measured", None
    best = min(distances, key=lambda pair: distances[pair])
    behind = distances[PUBLISHED_ABLATION] - distances[best]
    noise = spread(values(results, "frechet_distance", "lpd", ABLATION_STEPS)) or 0.0
    return (
        f"{question}, or behind by no more than the spread of seeds: the best is repulsion {best[0]}, proximity "
        f"{best[1]:g}, the published ones are behind by {behind:.3f}, spread {noise:.3f}",
        behind <= noise,
    )


def answers_table(results: Results) -> list[str]:
    """Every expectation with what was found, as Markdown."""
    answers = [quality_within_five_percent(results), *better_than_rivals(results), published_thresholds_best(results)]
    words = {True: "**holds**", False: "**does not hold**", None: "–"}
    return ["| expected | found | |", "|---|---|---|"] + [
        f"| {' | '.join(text.split(': ', 1))} | {words[holds]} |" for text, holds in answers
    ]


def _show(numbers: Sequence[float], form: str) -> str:
    if not numbers:
        return "–"
    deviation = spread(numbers)
    return format(statistics.mean(numbers), form) + ("" if deviation is None else f" ± {format(deviation, form)}")


def quality_table(results: Results, figure: str, form: str, kinds: Sequence[str] = ("table", "repeat")) -> list[str]:
    """Orders × steps of one figure, mean ± standard deviation where there are several seeds, as Markdown."""
    steps = results["settings"]["steps"]
    lines = [f"| order | {' | '.join(map(str, steps))} |", "|---" * (len(steps) + 1) + "|"]
    for order in results["settings"]["orders"]:
        cells = " | ".join(_show(values(results, figure, order, count, kinds), form) for count in steps)
        lines.append(f"| {NAMES[order]} | {cells} |")
    return lines


def own_steps_table(results: Results) -> list[str]:
    rows = [row for row in results["cells"] if row["kind"] == "own"]
    return [
        "| order | own steps | Fréchet distance | class accuracy | seconds per image |",
        "|---|---|---|---|---|",
    ] + [
        f"| {NAMES[row['order']]} | {row['steps']} | {row['frechet_distance']:.3f} | {row['class_accuracy']:.1%} | "
        f"{_show([row['sec_per_image']] if row['sec_per_image'] else [], '.5f')} |"
        for row in rows
    ]


def ablation_table(results: Results) -> list[str]:
    distances = ablation(results)
    proximities = sorted({proximity for _, proximity in distances})
    lines = ["| repulsion | " + " | ".join(f"proximity {proximity:g}" for proximity in proximities) + " |"]
    lines.append("|---" * (len(proximities) + 1) + "|")
    for repulsion in sorted({repulsion for repulsion, _ in distances}):
        cells = [distances.get((repulsion, proximity)) for proximity in proximities]
        lines.append(f"| {repulsion} | " + " | ".join("–" if d is None else f"{d:.3f}" for d in cells) + " |")
    return lines


def guidance_table(results: Results) -> list[str]:
    settings = results["settings"]
    rows = [row for row in results["cells"] if row["kind"] == "tuning"]
    lines = [f"| order | {' | '.join(f'{cfg:g}' for cfg in settings['cfgs'])} | chosen |"]
    lines.append("|---" * (len(settings["cfgs"]) + 2) + "|")
    for order in settings["orders"]:
        distances = {row["cfg"]: row["frechet_distance"] for row in rows if row["order"] == order}
        shown = " | ".join(f"{distances[cfg]:.2f}" if cfg in distances else "–" for cfg in settings["cfgs"])
        whole = len(distances) == len(settings["cfgs"])
        best = f"{min(distances, key=lambda cfg: distances[cfg]):g}" if whole else "–"
        lines.append(f"| {NAMES[order]} | {shown} | {best} |")
    return lines


def floors_table(results: Results) -> list[str]:
    lines = [
        "| scored against the test photos | features | Fréchet distance | read as their class |",
        "|---|---|---|---|",
    ]
    names = {"train": "training photos", "reconstructed": "test photos through the tokenizer"}
    for key, floor in results["floors"].items():
        accuracy = f"{floor['class_accuracy']:.1%}" if "class_accuracy" in floor else "–"
        name = names[key.partition("_")[2]]
        lines.append(f"| {name} | {floor['extractor']} | {floor['frechet_distance']:.3f} | {accuracy} |")
    return lines


def page(results: Results) -> str:
    """The whole page as Markdown, in figures taken from ``results`` alone."""
    settings, tokenizer, data = results["settings"], results["tokenizer"], results["data"]
    classifier, training, environment = results["classifier"], results["training"], results["environment"]
    seconds = results["stage_sec"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    model = results["model"]
    text = ["# Quality against steps, on photographs", ""]
    if settings["subset"] is not None:
        text += [f"**A test run with {settings['subset']} photos and tiny models: no figure here means anything.**", ""]
    text += [
        "Written by [`experiments/cifar10`](../experiments/cifar10/README.md) from the measurements; the questions and "
        "what counts as an answer were fixed before them.",
        "",
        *answers_table(results),
        "",
        f"{data['train']['images']:,} training and {data['test']['images']:,} test photos of {IMG_SIZE}×{IMG_SIZE} "
        f"pixels ({data['train']['source']}). {settings['num_images']:,} images per cell; ± is the standard deviation "
        f"over {len(settings['seeds'])} seeds of generation, where there are several, with one trained model. "
        f"{environment['device']}, Python {environment['python']}, {packages}; {results['date'][:10]}.",
        "",
        "## Fréchet distance",
        "",
        "Between generated images and the test photos, in the features of the classifier below; lower is better.",
        "",
        *quality_table(results, "frechet_distance", ".3f"),
        "",
        f"![Quality against steps]({PICTURES}/cifar10_quality.png)",
        "",
        "## Read as the class asked for",
        "",
        *quality_table(results, "class_accuracy", ".1%"),
        "",
        "## Seconds per image",
        "",
        f"Generating and decoding, batches of {settings['eval_bsz']:,}, decode path `{results['decode_path']}`.",
        "",
        *quality_table(results, "sec_per_image", ".5f", ("table",)),
        "",
    ]
    if any(row["kind"] == "own" for row in results["cells"]):
        text += [
            "All orders are cut into the same group sizes above. These take the groups of their own papers:",
            "",
            *own_steps_table(results),
            "",
        ]
    if any(row["kind"] == "fid" for row in results["cells"]):
        text += [
            "## FID",
            "",
            "Inception's features, one seed.",
            "",
            *quality_table(results, "fid", ".2f", ("fid",)),
            "",
        ]
    if any(row["kind"] == "ablation" for row in results["cells"]):
        text += [
            "## Repulsion and proximity",
            "",
            f"Fréchet distance of the locality-aware order at {ABLATION_STEPS} steps, one seed.",
            "",
            *ablation_table(results),
            "",
        ]
    text += [
        "## What is possible",
        "",
        *floors_table(results),
        "",
        "## Guidance",
        "",
        f"Tuned once per order: the scale of least Fréchet distance over {settings['tuning_images']:,} images at "
        f"{settings['tuning_steps']} steps, with seed {settings['tuning_seed']}, which no other cell has.",
        "",
        *guidance_table(results),
        "",
        "## Training",
        "",
        f"- Tokenizer, stride {STRIDE}: PSNR {tokenizer['psnr_db']:.2f} dB on "
        f"the test photos, {tokenizer['codebook_share']:.1%} of {tokenizer['tokenizer']['codebook_size']} codes in use "
        f"(perplexity {tokenizer['codebook_perplexity']:.0f}).",
        f"- Classifier: reads {classifier['test_accuracy']:.2%} of the test photos right.",
        f"- LPD: width {model['embed_dim']}, depth {model['depth']}; final loss {training['final_loss']:.3f}, "
        f"{training['images_per_sec']:,.0f} images per second in training (median).",
        "- Seconds of the stages: " + ", ".join(f"{name.replace('_', ' ')} {sec:.0f}" for name, sec in seconds.items())
        + f"; {sum(seconds.values()):.0f} in all.",
        "",
        f"![Training loss]({PICTURES}/cifar10_loss.png)",
        "",
        "## Samples",
        "",
    ]  # fmt: skip
    for steps in (256, 20):
        text += [f"Locality-aware, {steps} steps:", "", f"![{steps} steps]({PICTURES}/cifar10_samples_{steps}.png)", ""]
    return "\n".join(text)


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
            bars = [spread(numbers) or 0.0 for numbers in found.values()]
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
