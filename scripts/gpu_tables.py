"""Publishing what scripts/gpu_suite.py measured: copies in benchmarks/results/, tables between marks in the README.

A mark is an HTML comment: `<!-- gpu:rows -->` begins the table of the published rows, `<!-- /gpu:rows -->` ends it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.recipes import EVAL_RECIPES, EXPECTED
from experiments.cifar10.report import REPORT as CIFAR10
from experiments.produce.report import REPORT as PRODUCE
from util.errors import UserError, reading
from util.files import atomic_write, write_json
from util.readers import read_json, read_text

# Groups of parts that have a table of their own, as the README calls them.
TABLES = {
    "latency": "latency",
    "tiles": "products of a step",
    "orders": "orders",
    "train": "training",
    "evaluation": "evaluation",
}
REPORTS = (CIFAR10, PRODUCE)  # of the experiments on photographs, each a part of that name
KEPT = "\0"  # a space at which no line is broken
Content = dict[str, Any]


def read_group(folder: Path, summary: Content, group: str) -> Content:
    """The finished parts of a group with their conditions and results; of the tests also those that failed."""
    states = ("finished", "failed") if group == "tests" else ("finished",)

    def result(part: Content) -> Content:
        content = read_json("result", folder / part["result"])
        return {key: value for key, value in content.items() if key != "output"}  # a path of the machine it ran on

    parts = {
        name: {key: part[key] for key in ("command", "quick", "date", "revision", "seconds")} | {"result": result(part)}
        for name, part in summary["parts"].items()
        if part["group"] == group and part["state"] in states and (folder / part["result"]).is_file()
    }
    return {key: value for key, value in summary.items() if key != "parts"} | {"parts": parts}


def publish(folder: Path, name: str, root: Path) -> None:
    """Copy the results of a suite to ``root``/benchmarks/results/*_NAME and fill the README's tables from them.

    What has not been measured keeps the copy and the table that it has.

    Raises:
        UserError: if there are no results, one is damaged, or they are of tiny models or of a CPU; before anything is
            written.
    """
    summary, groups, finished = read_suite(folder)
    kernels = "kernels" in finished
    check_results(folder, summary, groups)
    reports = {report: folder / report.name / "report" for report in REPORTS if report.name in finished}
    for report, made in reports.items():
        report.published(made)
    results = root / "benchmarks" / "results"
    paths = {group: results / f"{group}_{name}.json" for group in ("tests", *TABLES)}
    published = {group: read_published(group, path) for group, path in paths.items() if path.is_file()} | groups
    readme = root / "README.md"
    text = fill(read_text("page", readme), "status", status(published, summary["device"]))
    for mark, table in blocks(groups, name, kernels):
        text = fill(text, mark, table)
    lists = [path.read_bytes() for path in sorted((folder / "kernels").glob("*.txt"))] if kernels else []
    for group, content in groups.items():
        write_json(paths[group], content)
    if kernels:
        with atomic_write(results / f"kernels_{name}.txt") as file:
            file.write(b"\n".join(lists))
    for report, made in reports.items():
        report.publish(made, name, root)
    with atomic_write(readme) as file:
        file.write(text.encode())
    print(f"{', '.join(groups)}: {results}/*_{name}.json and {readme}")


def read_suite(folder: Path) -> tuple[Content, Content, set[str]]:
    """The summary of a suite, groups with something to publish, finished parts. UserError as :func:`publish`."""
    path = folder / "summary.json"
    if not path.is_file():
        raise UserError(f"{folder} has no summary.json; run python -m scripts.gpu_suite --output_dir {folder} first.")
    with reading("summary", path):
        summary = read_json("summary", path)
        if summary["device"] == "CPU" or any(part["tiny"] for part in summary["parts"].values()):
            raise UserError(
                f"{folder} holds figures of tiny models or of a CPU, which mean nothing and are not published."
            )
        finished = {part for part, entry in summary["parts"].items() if entry["state"] == "finished"}
        groups = {group: read_group(folder, summary, group) for group in ("tests", *TABLES)}
        groups = {group: content for group, content in groups.items() if content["parts"]}
        for content in groups.values():
            conditions(content, {}, [])
    if not groups:
        raise UserError("no part of the suite has finished; there is nothing to publish.")
    return summary, groups, finished


def check_results(folder: Path, summary: Content, groups: Content) -> None:
    """Raise UserError, naming the file, for the result of a part that gives no table."""
    for group, content in groups.items():
        for part, entry in content["parts"].items():
            alone = {group: content | {"parts": {part: entry}}}
            with reading("result", folder / summary["parts"][part]["result"]):
                status(alone, summary["device"])
                list(blocks(alone, "", False))


def read_published(group: str, path: Path) -> Content:
    """A group as it was published earlier. UserError if the status can't be told from it."""
    with reading("published results", path):
        content: Content = read_json("published results", path)
        status({group: content}, "")
        return content


def fill(text: str, mark: str, table: str) -> str:
    """The text with what stands between the marks replaced. UserError if it has not both marks once."""
    begin, end = f"<!-- gpu:{mark} -->", f"<!-- /gpu:{mark} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or begin in rest or end in after:
        raise UserError(f"the README must have '{begin}' and then '{end}', once each.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def blocks(groups: Content, name: str, kernels: bool) -> Iterator[tuple[str, str]]:
    """(mark, Markdown) of every table that can be made from the groups of a publication.

    Args:
        kernels: whether it has a list of kernels.
    """
    if "latency" in groups:
        parts = groups["latency"]["parts"]
        listed = {"kernels of `graph`": f"kernels_{name}.txt"} if kernels else {}
        for mark, names, table, more in (
            ("paths", ["latency_by_path"], by_path, listed),
            ("rows", [f"latency_{row}" for row in EVAL_RECIPES], by_row, {}),
        ):
            chosen = groups["latency"] | {"parts": {part: parts[part] for part in names if part in parts}}
            if chosen["parts"]:
                files = {"all figures": f"latency_{name}.json"} | more
                yield mark, f"{table(chosen['parts'])}\n\n{conditions(chosen, files, protocol(chosen))}"
    tables = (("tiles", products), ("train", training), ("orders", orders), ("evaluation", evaluation))
    for mark, tabulate in tables:
        if mark in groups:
            content = groups[mark]
            result = content["parts"][mark]["result"]
            yield mark, f"{tabulate(result)}\n\n{conditions(content, {'all figures': f'{mark}_{name}.json'}, [])}"


def status(groups: Content, device: str) -> str:
    """A sentence or two on what has been run, in this publication and earlier ones of its name."""
    measured = ", ".join(what for group, what in TABLES.items() if group in groups)
    if "latency" in groups:
        text = f"**Measured on one {device}**: {measured} ([speed on a GPU](#speed-on-a-gpu))."
    elif measured:
        text = f"**Latency has not been measured on a GPU yet**; on one {device}: {measured}."
    else:
        text = f"**Nothing has been measured on a GPU yet**; tests have been run on one {device}."
    if "tests" in groups:
        counts = groups["tests"]["parts"]["tests"]["result"]
        text += f" GPU tests: {', '.join(f'{counts[key]} {key}' for key in ('passed', 'failed', 'skipped'))}."
    return text


def conditions(content: Content, files: dict[str, str], more: list[str]) -> str:
    """The line below a table: device, versions, code, date, protocol, command, and links to files by what they hold."""
    parts = content["parts"].values()
    dates = sorted({part["date"] for part in parts})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    driver = [] if content["driver"] is None else [f"driver {content['driver']}"]
    quick = " --quick" if any(part["quick"] for part in parts) else ""
    revisions = sorted({part["revision"] or "unknown" for part in parts})
    code = f"code of revision {' and '.join(name[:10] + name[40:] for name in revisions)}"  # a hash has 40 digits
    facts = [content["device"], *driver, f"torch {content['torch']}", f"triton {content['triton']}", code, days, *more]
    command = f"`python -m scripts.gpu_suite --output_dir DIR{quick}`"
    links = (f"[{what}](benchmarks/results/{file})" for what, file in files.items())
    whole = [text.replace(" ", KEPT) for text in (command, *links)]  # not broken into lines
    text = f"{', '.join(facts)}; {whole[0]} ({', '.join(whole[1:])})."
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False).replace(KEPT, " ")


def protocol(content: Content) -> list[str]:
    """How many runs the medians are of, by batch size."""
    results = [result for part in content["parts"].values() for result in part["result"]["results"]]
    counts = sorted({(result["batch_size"], result["warmup"], result["runs"]) for result in results})
    runs = (f"batch {size}: {runs} runs after {warmup}" for size, warmup, runs in counts)
    return [f"random weights, medians ({'; '.join(runs)})"]


def markdown(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(tuple(head)))
    return "\n".join(lines)


def figure(value: float | None, form: str, unit: str = "") -> str:
    """A value, or a dash where it was not measured."""
    return "–" if value is None else f"{value:{form}}{unit}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}%"


def title(model: str) -> str:
    """ "lpd_l" as the paper writes it."""
    return model.upper().replace("_", "-")


def by_path(parts: Content) -> str:
    """Latency of one image by decode path."""
    results = [result for part in parts.values() for result in part["result"]["results"]]
    found = {(result["path"], result["pixels"]): result for result in results}
    rows = []
    for path in dict.fromkeys(result["path"] for result in results):
        codes, pixels = (found.get((path, with_pixels), {}) for with_pixels in (False, True))
        rows.append(
            [
                f"`{path}`",
                figure(codes.get("median_ms"), ".1f", " ms"),
                figure(pixels.get("median_ms"), ".1f", " ms"),
                figure(pixels.get("speed_up"), ".1f"),
                figure(codes.get("graph_nodes"), ","),
                figure(pixels.get("peak_memory_gib"), ".1f", " GiB"),
            ]
        )
    head = ("LPD-L, 256 px, 20 steps, guided, one image", "codes", "with pixels", "times as fast as `plain`")
    return markdown((*head, "graph nodes (codes)", "peak memory"), rows)


def by_row(parts: Content) -> str:
    """The published evaluations: one image and batches of 64, with pixels, beside the paper's figures."""
    rows = []
    for name in (name for name in EVAL_RECIPES if f"latency_{name}" in parts):
        recipe, paper = EVAL_RECIPES[name], EXPECTED[name]
        results = {result["batch_size"]: result for result in parts[f"latency_{name}"]["result"]["results"]}
        one, many = results[1], results[64]
        rows.append(
            [
                f"{title(recipe['model'])}, {recipe['img_size']} px, {recipe['generation_steps']} steps",
                f"{one['median_ms']:.1f} ms",
                f"{1000 * paper.latency_s:.0f} ms",
                percent(one["weight_bytes_share"]),
                percent(one["flops_share"]),
                f"{many['images_per_sec']:.1f}",
                f"{paper.images_per_sec:.1f}",
                percent(many["flops_share"]),
                f"{many['peak_memory_gib']:.1f} GiB",
            ]
        )
    head = ("with pixels, guided", "batch 1", "paper, A100", "of the bandwidth", "of the arithmetic")
    return markdown((*head, "batch 64, images/s", "paper, A100", "of the arithmetic", "peak memory"), rows)


def products(result: Content) -> str:
    """Microseconds of each product of a step: the library's, and our own, with the tile that decoding takes first."""

    def microseconds(of: list[Content]) -> str:
        return figure(of[0]["us"] if of else None, ".1f")

    rows = []
    for product, number in dict.fromkeys((row["product"], row["rows"]) for row in result["products"]):
        found = [row for row in result["products"] if (row["product"], row["rows"]) == (product, number)]
        own = [row for row in found if (row["by"], row["weights"]) == ("own", "bfloat16")]
        taken = [row for row in own if row["chosen"]]  # with dependent launch, if the GPU has it, then without
        fastest = sorted(own, key=lambda row: row["us"])[:1]
        tiles = [f" ({row['columns']}×{row['block']}, {row['split']}, {row['stages']})" for row in fastest]
        rows.append(
            [
                f"{product}, {number} rows",
                microseconds([row for row in found if row["by"] == "library"]),
                microseconds(taken),
                microseconds(fastest) + "".join(tiles),
                microseconds(taken[1:]),
                microseconds([row for row in found if row["weights"] == "float8"]),
            ]
        )
    head = (
        f"products of a step, {title(result['model'])}, µs",
        "library",
        "own",
        "fastest (columns×block, split, stages)",
    )
    return markdown((*head, "own without dependent launch", "own, float8 weights"), rows)


def training(result: Content) -> str:
    """Training in one process at the batch size of the recipe."""
    rows = [
        [
            row["name"],
            figure(row.get("images_per_sec"), ".0f") if "failed" not in row else row["failed"],
            percent(row.get("peak_share")),
            figure(1000 * row["median_sec_per_step"] if "failed" not in row else None, ".0f", " ms"),
            f"{row['peak_memory_gib']:.1f} GiB",
        ]
        for row in result["rows"]
    ]
    what = f"training step, {title(result['model'])}, {result['img_size']} px"
    head = f"{what}, {result['batch_size']} images, {result['dtype']}"
    return markdown((head, "images/s", "of a large product's FLOP/s", "a step", "peak memory"), rows)


def orders(result: Content) -> str:
    """Orders per second by implementation and grid."""
    drawing = result["drawing"]
    sizes = dict.fromkeys((row["img_size"], row["steps"]) for row in drawing)
    rates = {(row["implementation"], row["img_size"]): row["orders_per_sec"] for row in drawing}
    rows = [
        [name, *(figure(rates.get((name, img_size)), ",.0f", "/s") for img_size, _ in sizes)]
        for name in dict.fromkeys(row["implementation"] for row in drawing)
    ]
    head = [f"{size // 16}×{size // 16} tokens, {steps} steps" for size, steps in sizes]
    return markdown(("locality-aware orders", *head), rows)


def evaluation(result: Content) -> str:
    """Images per second with and without scores, and the scores' share of a whole evaluation."""
    weights = ", random weights" if result["random_extractor_weights"] else ""
    extractor = f"{result['extractor']}{weights}"
    rows = [
        ["pictures alone, images/s", f"{result['images_per_sec_without_scores']:.1f}"],
        ["from codes to pixels, of the time of a picture", percent(result["pixels_share_of_generating"])],
        [f"with features ({extractor}), images/s", f"{result['images_per_sec_with_features']:.1f}"],
        ["scores, after the last image", f"{result['scores_sec']:.1f} s"],
        ["features and scores, of an evaluation of 50,000 images (extrapolated)",
         percent(result["scoring_share_of_50000_images"])],
    ]  # fmt: skip
    what = f"an evaluation, {title(result['model'])}, {result['img_size']} px, {result['generation_steps']} steps"
    return markdown((f"{what}, batches of {result['eval_bsz']}", ""), rows)
