"""Results of the experiments on photographs, made up, and photographs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from experiments import cells
from experiments.cells import Cell, Scale
from experiments.cifar10.scales import FULL as CIFAR10
from experiments.produce import contexts, naming
from experiments.produce.report import REPORT as PRODUCE_REPORT
from experiments.produce.scales import EPOCHS, TINY
from experiments.produce.scales import FULL as PRODUCE
from util.checkpoint import LAST
from util.files import write_json


def photo(rng: np.random.Generator, width: int, height: int, blur: float) -> Image.Image:
    """Smooth noise in colours."""
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return noise.filter(ImageFilter.GaussianBlur(blur))


def cifar10_results(distance: Callable[[Cell], float]) -> dict[str, Any]:
    """Of a full run of experiments/cifar10, with Fréchet distances made up."""
    guidance = {("lpd", order): 2.0 for order in CIFAR10.orders}
    found = [*cells.tuning_cells(CIFAR10), *cells.table_cells(CIFAR10, guidance, fid=False)]
    figures = {"class_accuracy": 0.75, "sec_per_image": 0.001, "images_per_sec": 900.0}
    floor = {"extractor": "net", "frechet_distance": 0.25, "class_accuracy": 0.9}
    return {
        "experiment": "cifar10",
        "date": "2026-01-02T03:04:05+00:00",
        "data": {name: {"source": "photos.npz", "images": 50_000, "sha256": ""} for name in ("train", "test")},
        "settings": json.loads(json.dumps(dataclasses.asdict(CIFAR10))),
        "environment": {"device": "a GPU", "python": "3.12", "packages": {"torch": "2.11"}},
        "decode_path": "compiled",
        "model": {"embed_dim": 512, "depth": 12},
        "stage_sec": {"tokenizer": 100.0, "lpd": 500.0},
        "tokenizer": {
            "psnr_db": 27.125, "codebook_share": 0.5, "codebook_perplexity": 300.0,
            "tokenizer": {"codebook_size": 1024},
        },
        "classifier": {"test_accuracy": 0.9375},
        "floors": {"reference_real": floor, "reference_reconstructed": floor},
        "trainings": {"lpd": {
            "loss_curve": [{"step": 1, "epoch": 0.5, "loss": 6.5}, {"step": 2, "epoch": 1.0, "loss": 6.0}],
            "final_loss": 6.0, "epochs": 18,
        }},
        "cells": [cell.row(figures | {"frechet_distance": distance(cell)}) for cell in found],
    }  # fmt: skip


def hoped_for(cell: Cell) -> float:
    """What the method claims: lpd stays level, the others rise as steps fall; seeds differ by 0.01."""
    penalty = 0.0 if cell.order == "lpd" else 40 / cell.steps
    penalty += 0.5 * abs(cell.repulsion - 2) + 0.5 * abs(cell.proximity - 1)
    return 10 + penalty + 0.01 * (cell.seed % 10)


def produce_results(scale: Scale = PRODUCE) -> dict[str, Any]:
    """Of a full run of experiments/produce, made up: locality-aware orders win with the mixed training alone."""
    guidance = {(model.name, order): 2.0 for model in scale.models for order in scale.orders}
    reported = [*cells.tuning_cells(scale), *cells.table_cells(scale, guidance, fid=False)]

    def figures(cell: Cell) -> dict[str, float]:
        better = (cell.order == "lpd") * (1 if cell.training == "lpd_mixed" else -1)
        return {"frechet_distance": 20 - better + 0.01 * cell.seed, "class_accuracy": 0.5, "sec_per_image": 0.01}

    curve = [{"step": n, "epoch": float(n), "loss": 6.0 - n, "val_loss": 6.0 - n / 2} for n in (1, 2)]
    curve.append({"step": 3, "epoch": 3.0, "loss": 2.5, "val_loss": 5.25})
    trained = {"loss_curve": curve, "final_loss": 2.5, "epochs": EPOCHS}
    space = {"samples": 30.0, "held_out": 28.0, "nearer": 0.07}
    floor = {"extractor": "net", "frechet_distance": 0.25, "class_accuracy": 0.9}
    bits = {"order": "lpd", "steps": 16, "bits_per_token": {"mean": 4.5, "stderr": 0.1}, "difference": None}
    trainings = {
        name: dict.fromkeys(words, 1.0) for name, words in (("lpd_random", ("random",)), ("lpd_mixed", ("lpd",)))
    }
    return {
        "experiment": PRODUCE_REPORT.title(scale),
        "date": "2026-01-02T03:04:05+00:00",
        "data": {name: {"source": "photos.npz", "images": 3000, "sha256": ""} for name in ("train", "test")},
        "settings": json.loads(json.dumps(dataclasses.asdict(scale))),
        "environment": {"device": "CPU", "python": "3.12", "packages": {"torch": "2.11"}},
        "model": {"embed_dim": 192, "depth": 6},
        "stage_sec": {"tokenizer": 100.0},
        "tokenizer": {"psnr_db": 20.125, "codebook_share": 0.5, "tokenizer": {"codebook_size": 512}},
        "classifier": {"test_accuracy": 0.75},
        "floors": {"reference_real": floor},
        "trainings": dict.fromkeys(scale.trainings, trained),
        "cells": [cell.row(figures(cell)) for cell in reported],
        "neighbours": {"lpd_random": {"pixels": space, "features": space}},
        "likelihood": {"lpd_random": [bits]},
        "contexts": contexts.measure_contexts(
            scale.img_size, scale.stride, ("lpd", "random"), (scale.tuning_steps, scale.steps[-1]), trainings
        ),
        "unlabelled": {
            **{"model": "lpd_random", "steps": 16, "seed": 0, "cfg": 6.0, "temperature": 0.85},
            "pictures": {"1": "Tomato", "2": "Kiwi"},
            "photos": {"1": "Kiwi", "2": "Tomato"},
            "reconstructions": {"1": "Tomato", "2": "Kiwi"},
            "named": [
                {"who": "A child", "pictures": {"1": "Tomato", "2": "Tomato"}},
                {
                    "who": "Its mother",
                    "pictures": {"1": "Tomato", "2": "Kiwi"},
                    "photos": {"1": "Kiwi", "2": "Tomato"},
                    "reconstructions": {"1": "Kiwi", "2": "Tomato"},
                },
            ],
        },
    }


def write_finished_run(out: Path, classifier: Path) -> None:
    """A folder of the tiny experiments/produce as its stages leave it, with made-up figures.

    Args:
        classifier: file of one, whatever it was trained on.
    """
    first, *_ = TINY.models
    for path in (*(model.checkpoint(out) for model in TINY.models), cells.tokenizer_path(out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())
    shutil.copy(classifier, cells.classifier_path(out))
    guidance = {(model.name, order): 2.0 for model in TINY.models for order in TINY.orders}
    about = {
        "environment": {"device": "CPU", "python": "3.11", "packages": {"torch": "2.11"}},
        "settings": {"decode_path": "plain"}, "model": {"embed_dim": 32, "depth": 2},
    }  # fmt: skip
    for cell in (*cells.tuning_cells(TINY), *cells.table_cells(TINY, guidance, fid=False)):
        figures = {"frechet_distance": 9.0 + cell.seed - cell.cfg, "class_accuracy": 0.5, "sec_per_image": 0.1}
        record = dataclasses.asdict(cell) | cells.file_hashes(out, cell.model)
        write_json(out / "eval" / cell.name / "results.json", about | figures | {"record": record})
        Image.new("RGB", (8, 8)).save(out / "eval" / cell.name / "grid.png")
    known = produce_results()
    write_json(out / "tokenizer" / "metrics.json", known["tokenizer"])
    write_json(out / "floors" / "reference_real.json", known["floors"]["reference_real"])
    for name in TINY.trainings:
        lines = (json.dumps(line) for line in known["trainings"][name]["loss_curve"])
        (out / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        write_json((out / name / LAST).with_suffix(".json"), {"epoch": 2})
    hashes = cells.file_hashes(out, first)
    write_json(out / "neighbours" / f"{first.name}.json", known["neighbours"]["lpd_random"] | hashes)
    source = {"pretrained_ckpt": {"sha256": hashes["checkpoint_sha256"]}}
    of_cells = {"cells": known["likelihood"]["lpd_random"], "source": source}
    write_json(out / "likelihood" / first.name / "likelihood.json", of_cells)
    write_json(out / "contexts.json", known["contexts"])
    write_json(out / naming.NAMED, known["unlabelled"]["named"])
    answers = {kind: known["unlabelled"][kind] for kind in naming.GRIDS}
    write_json(out / naming.ANSWERS, answers | naming.what_is_drawn(out, TINY, first))
    for name in naming.GRIDS.values():
        Image.new("RGB", (8, 8)).save(out / name)
