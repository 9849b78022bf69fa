"""Photographs of fruit and vegetables on two CPU cores: which generation order, how many steps, and why.

    python -m experiments.produce.run --data produce64.npz --output_dir runs/produce

Trains a tokenizer, a classifier as judge, and two LPDs, one on random orders and one with locality-aware orders among
them. What is finished is not done again: after an interruption, or when --time_limit has ended a call, the same command
resumes. python -m experiments.produce.data makes the photographs.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import (
    Guidance,
    Model,
    Scale,
    best_guidance,
    file_hashes,
    rows_of,
    tokenizer_path,
    tuning_cells,
)
from experiments.driver import Call, Experiment
from experiments.produce.contexts import measure_contexts
from experiments.produce.naming import GRIDS, draw_unlabelled, read_unlabelled, what_is_drawn
from experiments.produce.neighbours import measure_neighbours
from experiments.produce.report import REPORT
from experiments.produce.scales import BALANCED, SCALES
from experiments.reports import read_figures
from orders.config import parse_shares
from util.cli import exit_on_user_error
from util.data.images import SPLITS, open_images, write_image_archive
from util.errors import UserError, reading
from util.files import write_json
from util.readers import read_json


def write_balanced(source: str, img_size: int, per_class: int, path: Path) -> None:
    """As many photos of each class as an image archive: a class's photos in turn, again and again, evenly spread."""
    images = open_images(source, img_size)
    files, labels = [], []
    for label in np.unique(images.labels).tolist():
        of_class = np.flatnonzero(images.labels == label)
        count = len(of_class)
        turns = np.linspace(0, count, per_class, endpoint=False) if per_class < count else np.arange(per_class) % count
        for index in of_class[turns.astype(int)].tolist():
            file = io.BytesIO()
            images.read(index).save(file, "PNG")
            files.append(file.getvalue())
            labels.append(label)
    write_image_archive(path, files, labels, images.classes, [0] * len(files))


def prepare(out: Path, splits: tuple[str, str], scale: Scale) -> tuple[str, str, str]:
    """Training photos as they are; test photos and those that statistics are taken of with equally many of each class.

    Generated images are, and the data set has 17 times as many apples as asparagus.
    """
    paths = [out / f"balanced_{split}.npz" for split in SPLITS]
    for source, path, split in zip(splits, paths, SPLITS, strict=True):
        if not path.exists():
            write_balanced(source, scale.img_size, BALANCED[split], path)
    return splits[0], str(paths[1]), str(paths[0])


def tuned_guidance(call: Call) -> Guidance:
    """The guidance of every model and order; UserError before the sweep has tuned it."""
    cells = tuning_cells(call.scale)
    rows = rows_of(call.out, cells)
    if len(rows) < len(cells):
        raise UserError(f"{call.out} has no tuned guidance yet; run the stage sweep before.")
    return best_guidance(rows)


def likelihood(call: Call) -> None:
    """Likelihood of the test photos under every model, order and number of steps."""
    scale = call.scale
    for model in scale.models:
        call.stages.command(
            f"likelihood {model.name}", "-m", "scripts.likelihood", "--pretrained_ckpt", model.checkpoint(call.out),
            "--vqgan_path", tokenizer_path(call.out), "--cached_path", call.out / "codes_validation",
            "--orders", *filter(model.takes, scale.orders), "--steps", *map(str, model.steps or scale.steps),
            "--baseline", "random", "--no-one_by_one", "--output_dir", call.out / "likelihood" / model.name,
            "--device", str(call.dist.device), *(("--use_ema",) if scale.use_ema else ()), stoppable=True,
            always=read_likelihood(call.out, model) is None,
        )  # fmt: skip


def read_likelihood(out: Path, model: Model) -> list[dict[str, Any]] | None:
    """Bits per token of every order and number of steps, under the present model; None where that was not measured."""
    path = out / "likelihood" / model.name / "likelihood.json"
    if not path.exists():
        return None
    present = file_hashes(out, model)["checkpoint_sha256"]
    with reading("likelihood", path):
        found = read_json("likelihood", path)
        if found["source"]["pretrained_ckpt"]["sha256"] != present:
            return None
        return [
            {name: cell[name] for name in ("order", "steps", "bits_per_token", "difference")} for cell in found["cells"]
        ]


def neighbours(call: Call) -> None:
    """Training photos nearest to samples of every model."""
    guidance = tuned_guidance(call)
    for model in call.scale.models:
        path = neighbours_path(call.out, model)

        def measure(model: Model = model, path: Path = path) -> None:
            cfg = guidance[model.name, "lpd"]
            picture = path.with_suffix(".png")
            write_json(path, measure_neighbours(call.out, call.scale, model, cfg, call.splits, call.dist, picture))

        known = read_neighbours(call.out, model)
        call.stages.run(f"neighbours {model.name}", measure, "experiments/produce/neighbours.py", always=known is None)


def neighbours_path(out: Path, model: Model) -> Path:
    return out / "neighbours" / f"{model.name}.json"


def read_neighbours(out: Path, model: Model) -> dict[str, Any] | None:
    """What was measured of the present model; None if nothing was."""
    path = neighbours_path(out, model)
    if not path.exists():
        return None
    present = file_hashes(out, model)
    with reading("distances", path):
        found: dict[str, Any] = read_json("distances", path)
        return found if found.items() >= present.items() else None


def pictures(call: Call) -> None:
    """A picture and a test photo of each class without their names, and the answers: who names them?"""
    out, scale, model = call.out, call.scale, call.scale.models[0]
    drawn = what_is_drawn(out, scale, model)

    def draw() -> None:
        draw_unlabelled(out, scale, model, call.splits[1], call.dist)

    settings = ", ".join(f"{name} {value}" for name, value in drawn.items())
    call.stages.run("pictures", draw, f"{', '.join(GRIDS)} of each class: {settings}")


def contexts(call: Call) -> None:
    """What is known around a token in decoding and in training; needs no model."""
    scale = call.scale
    shares = {name: parse_shares(words[words.index("--train_orders") + 1 :]) for name, words in scale.trainings.items()}

    def measure() -> None:
        found = measure_contexts(scale.img_size, scale.stride, scale.orders, scale.steps, shares)
        write_json(call.out / "contexts.json", found)

    steps = " ".join(map(str, scale.steps))
    drawn = f"stride {scale.stride}; {' '.join(scale.orders)}; {steps} steps; {shares}"
    call.stages.run("contexts", measure, f"experiments/produce/contexts.py: {drawn}")


def more_results(call: Call, folder: Path) -> dict[str, Any]:
    """What the stages above have measured, as far as they have run; the picture of all classes goes into a folder."""
    out, models = call.out, [model for model in call.scale.models if model.checkpoint(call.out).exists()]
    measured = {model.name: read_neighbours(out, model) for model in models}
    likelihoods = {model.name: read_likelihood(out, model) for model in models}
    path = out / "contexts.json"
    first = call.scale.models[0]
    unlabelled = read_unlabelled(out, call.scale, first) if first in models else None
    if unlabelled is not None:
        shutil.copy(out / GRIDS["pictures"], folder / f"{REPORT.title(call.scale)}_{GRIDS['pictures']}")
    return {
        "neighbours": {name: found for name, found in measured.items() if found is not None},
        "likelihood": {name: found for name, found in likelihoods.items() if found is not None},
        "contexts": read_figures("contexts", path, "decoding", "training") if path.exists() else None,
        "unlabelled": unlabelled,
    }


EXPERIMENT = Experiment(
    REPORT, SCALES, __doc__, classes=35, photos=3111,
    more_stages={"likelihood": likelihood, "neighbours": neighbours, "pictures": pictures, "contexts": contexts},
    more_results=more_results, prepare=prepare, validation=True,
)  # fmt: skip

if __name__ == "__main__":
    exit_on_user_error(EXPERIMENT.main)
