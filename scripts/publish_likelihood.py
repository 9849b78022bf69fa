"""A section of docs/likelihood.md, with its plots and figures, from finished runs; replaced where it is there already.

    python -m scripts.publish_likelihood digits --title "Handwritten digits" --likelihood RUN/likelihood \\
        --schedules RUN/schedule_*/schedule.json --evaluations RUN/eval/*/results.json

Takes the output folder of scripts.likelihood, schedule files of scripts.find_schedule, and results of
main_lpd.py --evaluate, whose Fréchet distances are compared with the likelihoods of the same cells. A section stands
between the marks `<!-- likelihood:NAME -->` and `<!-- /likelihood:NAME -->`; a new one comes at the end of the page.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from orders.figures import TITLES
from scripts.gpu_tables import markdown
from util.cli import Parser, exit_on_user_error
from util.data.images import load_rgb
from util.errors import UserError, reading
from util.files import atomic_write, write_json
from util.readers import read_json, read_text

ROOT = Path(__file__).resolve().parents[1]
PLOTS = {
    "steps": "Bits per token against steps",
    "curves": "How the difference to the baseline comes about, step by step",
    "positions": "Bits of each position",
}
Content = dict[str, Any]


def read_results(path: Path) -> Content:
    content = read_json("results", path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no results.")
    return content


def pivot(rows: Sequence[Content], figure: Any) -> str:
    """Orders down, steps across; ``figure`` gives the text of a row."""
    counts = sorted({row["steps"] for row in rows}, reverse=True)
    texts = {(row["order"], row["steps"]): figure(row) for row in rows}
    orders = dict.fromkeys(row["order"] for row in rows)
    lines = ([TITLES.get(order, order), *(texts.get((order, n), "–") for n in counts)] for order in orders)
    return markdown(["order \\ steps", *map(str, counts)], lines)


def plus_minus(difference: Content | None) -> str:
    """A difference with half of its 95 % interval."""
    if difference is None:
        return "–"
    return f"{difference['mean']:+.3f} ± {difference['high'] - difference['mean']:.3f}"


def cell_key(row: Content) -> str:
    """By which a cell of a likelihood and an evaluation with its order, schedule and thresholds are known."""
    thresholds = [row[f"{name}_threshold"] for name in ("proximity", "repulsion")]
    return json.dumps([row["order"], row["group_sizes"], *thresholds])


def matched(bits: Mapping[str, float], evaluation: Content) -> list[Content]:
    """An evaluation with the bits per token of its cell: kind, steps, guidance and Fréchet distance; or nothing.

    Args:
        bits: of the cells, by their key.
    """
    settings = evaluation["settings"]
    if cell_key(settings) not in bits:
        return []
    return [
        {
            "order": str(settings["order"]),
            "steps": len(settings["group_sizes"]),
            "cfg": float(settings["cfg"]),
            "bits": bits[cell_key(settings)],
            "frechet_distance": float(evaluation["frechet_distance"]),
            "num_images": operator.index(evaluation["num_images"]),
        }
    ]


def correlation_table(pairs: Sequence[Content]) -> str:
    """Spearman's rank correlation of bits per token and Fréchet distance, by guidance, over all cells and by steps."""
    lines = []
    for cfg in sorted({pair["cfg"] for pair in pairs}):
        mine = [pair for pair in pairs if pair["cfg"] == cfg]
        counts = sorted({pair["steps"] for pair in mine}, reverse=True)
        groups = {"all": mine} | {str(n): [pair for pair in mine if pair["steps"] == n] for n in counts}
        for name, group in groups.items():
            if len(group) >= 5:
                found = spearmanr([pair["bits"] for pair in group], [pair["frechet_distance"] for pair in group])
                lines.append([f"{cfg:g}", name, str(len(group)), f"{found.statistic:+.2f}", f"{found.pvalue:.3f}"])
    return markdown(["guidance", "steps", "cells", "rank correlation", "p"], lines)


def draw_pairs(path: Path, pairs: Sequence[Content]) -> None:
    """Fréchet distance against bits per token, a panel for each guidance."""
    from matplotlib.figure import Figure  # takes a second

    cfgs = sorted({pair["cfg"] for pair in pairs})
    orders = list(dict.fromkeys(pair["order"] for pair in pairs))
    markers = dict(zip(sorted({pair["steps"] for pair in pairs}), itertools.cycle("vo^sDP*X"), strict=False))
    figure = Figure(figsize=(5 * len(cfgs), 4.6), layout="constrained")
    for axis, cfg in zip(figure.subplots(1, len(cfgs), squeeze=False)[0], cfgs, strict=True):
        for pair in (pair for pair in pairs if pair["cfg"] == cfg):
            color = f"C{orders.index(pair['order'])}"
            axis.plot(pair["bits"], pair["frechet_distance"], markers[pair["steps"]], color=color, ms=6)
        axis.set(title=f"guidance {cfg:g}", xlabel="bits per token", ylabel="Fréchet distance")
        axis.grid(alpha=0.3)
        for number, order in enumerate(orders):
            axis.plot([], [], "s", color=f"C{number}", label=order)
        for steps, marker in markers.items():
            axis.plot([], [], marker, color="grey", label=f"{steps} steps")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=90)


def schedule_table(schedules: Sequence[Content]) -> str:
    def thresholds(schedule: Content, name: str) -> str:
        of_steps = schedule[f"{name}_threshold"]
        values = of_steps[1:] if isinstance(of_steps, list) else [of_steps]  # the first step has no use for them
        values = values[:1] if len(set(values)) == 1 else values
        return ", ".join("none" if value is None else f"{value:g}" for value in values)

    lines = []
    for schedule in sorted(schedules, key=lambda schedule: -len(schedule["group_sizes"])):
        found = schedule["found"]
        sizes = schedule["group_sizes"], found["published_group_sizes"]
        lines.append(
            [
                str(len(sizes[0])),
                f"{found['published_bits_per_token']['mean']:.3f}",
                f"{found['bits_per_token']['mean']:.3f}",
                plus_minus(found["difference"]),
                *(" ".join(map(str, column)) for column in sizes),
                thresholds(schedule, "proximity"),
                thresholds(schedule, "repulsion"),
            ]
        )
    heads = ["steps", "published", "found", "difference", "sizes found", "sizes published", "proximity", "repulsion"]
    return markdown(heads, lines)


def schedule_paragraphs(schedules: Sequence[Content]) -> list[str]:
    confirmed, seconds = (schedules[0]["found"][key] for key in ("confirmed_on", "seconds"))
    several = schedules[0]["found"]["settings"]["orders_per_image"]
    passes = max(schedule["found"]["passes"] for schedule in schedules)
    return [
        "### The searched schedule against the published one",
        wrapped(
            f"Locality-aware orders; {seconds:.0f} s of search each on half of the images (at most {passes:,} "
            f"passes), bits per token of the {confirmed} others, {several} orders each. Thresholds are one for all "
            "steps, or one for each from the second on."
        ),
        schedule_table(schedules),
    ]


def wrapped(text: str) -> str:
    return textwrap.fill(text, width=120, break_on_hyphens=False)


def section(name: str, title: str, results: Content, schedules: Sequence[Content], pairs: Sequence[Content]) -> str:
    """The Markdown of a section, in figures of these results alone."""
    rows, environment = results["cells"], results["environment"]
    packages = environment["packages"]
    each = results["orders_per_image"]
    paragraphs = [
        f"## {title}",
        wrapped(
            f"{results['num_images']} held-out images, {each} order{'s' if each > 1 else ''} each where they vary, "
            f"given the class; {environment['device_type']}, Python {environment['python']}, torch "
            f"{packages['torch']}. Bits per token, less is better; ± is the standard error over images."
        ),
        pivot(rows, lambda row: "{mean:.3f} ± {stderr:.3f}".format(**row["bits_per_token"])),
    ]
    if baseline := next((row["baseline"] for row in rows if row["baseline"] not in (None, row["name"])), None):
        paragraphs += [
            f"Paired difference to the order `{baseline.rpartition('/')[0]}` on the same images, ± half of the 95 % "
            "interval:",
            pivot(rows, lambda row: "–" if row["baseline"] == row["name"] else plus_minus(row["difference"])),
        ]
    if any(row["parallel_loss"] for row in rows):
        paragraphs += [
            "What drawing in parallel loses: the difference to the same orders, one token per step.",
            pivot(rows, lambda row: "–" if set(row["group_sizes"]) == {1} else plus_minus(row["parallel_loss"])),
        ]
    paragraphs += [f"![{text}](images/likelihood_{name}_{plot}.png)" for plot, text in PLOTS.items()]
    if schedules:
        paragraphs += schedule_paragraphs(schedules)
    if pairs:
        paragraphs += [
            "### Does likelihood predict the Fréchet distance?",
            wrapped(
                f"The same cells generated and scored, {pairs[0]['num_images']:,} images each. Rank correlation "
                "(Spearman) of bits per token and Fréchet distance: +1 if likelihood orders the cells as the distance "
                "does."
            ),
            correlation_table(pairs),
            f"![Fréchet distance against bits per token](images/likelihood_{name}_frechet.png)",
        ]
    return "\n\n".join(paragraphs)


def figures(results: Content, schedules: Sequence[Content], pairs: Sequence[Content]) -> Content:
    """What the repository keeps of the results: plain data without the long lists."""
    long = ("group_sizes", "step_bits", "step_stderr", "position_bits")
    return {
        **{key: results[key] for key in ("num_images", "orders_per_image", "seconds", "passes_per_sec", "environment")},
        "cells": [{key: value for key, value in row.items() if key not in long} for row in results["cells"]],
        "schedules": [
            {key: value for key, value in schedule.items() if key != "found"}
            | {key: value for key, value in schedule["found"].items() if key not in ("settings", "source")}
            for schedule in schedules
        ],
        "evaluations": list(pairs),
    }


def put(text: str, name: str, content: str) -> str:
    """The page with the section replaced, or added at the end. UserError where its end can't be found."""
    begin, end = f"<!-- likelihood:{name} -->", f"<!-- /likelihood:{name} -->"
    block = f"{begin}\n{content}\n{end}"
    before, found, rest = text.partition(begin)
    if not found:
        return f"{text.rstrip()}\n\n{block}\n"
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(f"the page has '{begin}' without '{end}' behind it; add that where the section ends.")
    return before + block + after


def publish(
    name: str, title: str, likelihood: Path, schedules: Sequence[Path], evaluations: Sequence[Path], root: Path
) -> None:
    """Write section, plots and figures of these runs under ``root``. UserError for files that are something else."""
    if not re.fullmatch("[a-z0-9_]+", name):
        raise UserError(f"the section's name {name!r} must be of small letters, digits and _.")
    path, images, page = likelihood / "likelihood.json", root / "docs" / "images", root / "docs" / "likelihood.md"
    results, found, pairs = read_results(path), [], []
    with reading("results", path):
        bits = {cell_key(row): float(row["bits_per_token"]["mean"]) for row in results["cells"] if row["with_class"]}
    for other in schedules:
        found.append(read_results(other))
        with reading("results", other):
            schedule_paragraphs(found[-1:])
    for other in evaluations:
        evaluation = read_results(other)
        with reading("results", other):
            pairs += matched(bits, evaluation)
    with reading("results", path):
        content, kept = section(name, title, results, found, pairs), figures(results, found, pairs)
    text = put(read_text("page", page) if page.exists() else "# Likelihood under any order\n", name, content)
    for plot in PLOTS:
        load_rgb(likelihood / f"{plot}.png")  # a damaged one is not copied
    images.mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        shutil.copy(likelihood / f"{plot}.png", images / f"likelihood_{name}_{plot}.png")
    if pairs:
        draw_pairs(images / f"likelihood_{name}_frechet.png", pairs)
    write_json(root / "benchmarks" / "results" / f"likelihood_{name}.json", kept)
    with atomic_write(page) as file:
        file.write(text.encode())
    print(f"{page}: section {name}, {len(results['cells'])} cells, {len(pairs)} of them scored")


def main() -> None:
    parser = Parser(prog="python -m scripts.publish_likelihood", description=__doc__)
    parser.add_argument("name", help="of the section's marks and files, such as digits")
    parser.add_argument("--title", required=True, help="heading of the section")
    parser.add_argument("--likelihood", type=Path, required=True, help="output folder of scripts.likelihood")
    parser.add_argument("--schedules", type=Path, nargs="+", default=[], help="schedule files of scripts.find_schedule")
    parser.add_argument("--evaluations", type=Path, nargs="+", default=[], help="results.json of main_lpd.py")
    args = parser.parse_args()
    publish(args.name, args.title, args.likelihood, args.schedules, args.evaluations, ROOT)


if __name__ == "__main__":
    exit_on_user_error(main)
