"""The evaluation sweep: one model, loaded once, generates and scores cell after cell of the table.

A cell is one combination of order, number of steps, guidance, thresholds and seed; its results lie in a folder of its
own, and a cell that has them is not done again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.evaluation.evaluate import EvalConfig, evaluate, prepare
from engine.scoring.features import INCEPTION, FeatureExtractor, load_feature_extractor
from engine.scoring.metrics import load_reference_statistics
from experiments.cifar10.settings import GRID, IMG_SIZE, OWN_STEPS, STRIDE, Settings
from models.flops import decoding_flops
from models.lpd import LPD, LPDConfig, load_weights
from orders import default_repulsion, group_sizes, natural_group_sizes
from scripts.stages import Clock
from tokenizers import load_tokenizer
from util.checkpoint import load_checkpoint
from util.dist import Dist
from util.files import sha256

DEFAULT_REPULSION, DEFAULT_PROXIMITY = default_repulsion(GRID), 1.0
FID_BATCH = 500  # Inception enlarges pictures to 299 pixels


@dataclass(frozen=True)
class Cell:
    """One evaluation. ``kind``: tuning (of guidance), table, repeat (another seed), ablation, own (steps), or fid."""

    kind: str
    order: str
    steps: int
    cfg: float
    num_images: int
    seed: int
    repulsion: int = DEFAULT_REPULSION
    proximity: float = DEFAULT_PROXIMITY

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.kind, self.order, f"{self.steps}steps", f"cfg{self.cfg:g}", f"seed{self.seed}"]
        if (self.repulsion, self.proximity) != (DEFAULT_REPULSION, DEFAULT_PROXIMITY):
            parts.append(f"repulsion{self.repulsion}_proximity{self.proximity:g}")
        return "_".join(parts)

    def group_sizes(self) -> tuple[int, ...]:
        """The schedule of this number of steps, the same for all orders; of ``own`` cells that of the order's paper."""
        own = self.kind == "own"
        return natural_group_sizes(self.order, GRID) if own else group_sizes(IMG_SIZE, self.steps, STRIDE)


def tuning_cells(settings: Settings) -> list[Cell]:
    """Every order with every guidance scale, on a seed that no reported cell has."""
    return [
        Cell("tuning", order, settings.tuning_steps, cfg, settings.tuning_images, settings.tuning_seed)
        for order in settings.orders
        for cfg in settings.cfgs
    ]


def table_cells(settings: Settings, guidance: dict[str, float], fid: bool) -> list[Cell]:
    """All reported cells at the tuned guidance of their order, the most telling first."""

    def cell(kind: str, order: str, steps: int, seed: int = settings.seeds[0], **thresholds: Any) -> Cell:
        return Cell(kind, order, steps, guidance[order], settings.num_images, seed, **thresholds)

    repeated_orders = {order for order, _ in settings.repeated}
    main = [order for order in settings.orders if order in repeated_orders]
    others = [order for order in settings.orders if order not in repeated_orders]
    cells = [cell("table", order, steps) for order in main for steps in settings.steps]
    cells += [cell("repeat", order, steps, seed) for seed in settings.seeds[1:] for order, steps in settings.repeated]
    cells += [
        cell("ablation", "lpd", 20, repulsion=repulsion, proximity=proximity)
        for repulsion in settings.repulsions
        for proximity in settings.proximities
        if (repulsion, proximity) != (DEFAULT_REPULSION, DEFAULT_PROXIMITY)  # in the table
    ]
    cells += [cell("table", order, steps) for order in others for steps in settings.steps]
    cells += [cell("own", order, len(natural_group_sizes(order, GRID))) for order in others if order in OWN_STEPS]
    if fid:
        cells += [cell("fid", order, steps) for order in settings.orders for steps in settings.steps]
    return cells


def best_guidance(settings: Settings, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The scale of least Fréchet distance of every order, from the rows of the tuning cells."""
    tuned = [row for row in rows if row["kind"] == "tuning"]
    return {
        order: min((row for row in tuned if row["order"] == order), key=lambda row: row["frechet_distance"])["cfg"]
        for order in settings.orders
    }


def model_files(out: Path) -> tuple[Path, Path]:
    """Checkpoint and tokenizer of an output folder."""
    return out / "lpd" / "checkpoint-last.pth", out / "tokenizer" / "tokenizer.pt"


def model_hashes(out: Path) -> dict[str, str]:
    checkpoint, tokenizer = model_files(out)
    return {"checkpoint_sha256": sha256(checkpoint), "tokenizer_sha256": sha256(tokenizer)}


def results_of(out: Path, cell: Cell, hashes: dict[str, str]) -> dict[str, Any] | None:
    """The results of a cell, unless there are none or they were made with other files."""
    path = out / "eval" / cell.name / "results.json"
    results = json.loads(path.read_text()) if path.exists() else None
    return results if results is not None and results["record"] == dataclasses.asdict(cell) | hashes else None


class Sweep:
    """Model, tokenizer and extractors of one output folder, and the cells they evaluate."""

    def __init__(self, out: Path, settings: Settings, dist: Dist, inception_path: Path | None) -> None:
        self.out, self.settings, self.dist, self.inception_path = out, settings, dist, inception_path
        checkpoint_path, tokenizer_path = model_files(out)
        checkpoint = load_checkpoint(checkpoint_path)
        self.model = LPD(LPDConfig(**checkpoint["config"]))
        load_weights(self.model, checkpoint["model"], str(checkpoint_path))
        self.model.to(dist.device).eval()
        self.classes = tuple(checkpoint["classes"])
        self.tokenizer = load_tokenizer(tokenizer_path, dist.device)
        self.extractors = {"own": load_feature_extractor(str(out / "classifier.pt"), dist.device)}
        if inception_path is not None:
            self.extractors["fid"] = load_feature_extractor(INCEPTION, dist.device, inception_path)
        self.files = model_hashes(out)

    def run(self, clock: Clock) -> None:
        """Evaluate what is missing; raises OutOfTime between two cells."""
        tuning = tuning_cells(self.settings)
        self._evaluate_all(tuning, clock)
        guidance = best_guidance(self.settings, (row(cell, self._results(cell) or {}) for cell in tuning))
        print("guidance:", ", ".join(f"{order} {cfg:g}" for order, cfg in guidance.items()), flush=True)
        self._evaluate_all(table_cells(self.settings, guidance, self.inception_path is not None), clock)

    def _evaluate_all(self, cells: list[Cell], clock: Clock) -> None:
        for number, cell in enumerate(cells, start=1):
            if self._results(cell) is None:
                clock.check(f"cell {number} of {len(cells)}, {cell.name}")
                print(f"-- cell {number} of {len(cells)}: {cell.name}", flush=True)
                self._evaluate(cell)

    def _extractor(self, cell: Cell) -> FeatureExtractor:
        return self.extractors["fid" if cell.kind == "fid" else "own"]

    def _hashes(self, cell: Cell) -> dict[str, str]:
        """Of the files that the results depend on; results of others are done again."""
        return self.files | {"extractor_sha256": self._extractor(cell).weights_hash}

    def _results(self, cell: Cell) -> dict[str, Any] | None:
        return results_of(self.out, cell, self._hashes(cell))

    def _evaluate(self, cell: Cell) -> None:
        inception = cell.kind == "fid"
        config = EvalConfig(
            output_dir=self.out / "eval" / cell.name,
            group_sizes=cell.group_sizes(),
            num_images=cell.num_images,
            eval_bsz=min(self.settings.eval_bsz, FID_BATCH) if inception else self.settings.eval_bsz,
            cfg=cell.cfg,
            order=cell.order,
            proximity_threshold=cell.proximity,
            repulsion_threshold=cell.repulsion,
            seed=cell.seed,
            bf16=self.dist.device.type == "cuda",
            # Large batches keep a GPU busy; capturing a graph for the few of a cell would cost more than it saves.
            decode_path="compiled" if self.dist.device.type == "cuda" else "auto",
            feature_extractor=INCEPTION if inception else str(self.out / "classifier.pt"),
            inception_path=self.inception_path,
            reference_statistics=self.out / ("inception.npz" if inception else "reference.npz"),
            classes=self.classes,
        )
        inputs = prepare(config, self.model.config, self.dist, self._extractor(cell))
        record = dataclasses.asdict(cell) | self._hashes(cell)
        evaluate(self.model, self.tokenizer, config, self.dist, inputs=inputs, record=record)


def row(cell: Cell, results: dict[str, Any]) -> dict[str, Any]:
    """A cell and its figures in one flat dict."""
    figures = ("frechet_distance", "fid", "inception_score", "class_accuracy", "sec_per_image", "images_per_sec")
    return dataclasses.asdict(cell) | {name: results[name] for name in figures if name in results}


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell whose figures a row holds."""
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def finished_rows(out: Path, settings: Settings) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(row, whole results) of every cell of the settings that has results, in their order.

    Results of an earlier model, tokenizer or extractor, or of another guidance than the tuned one, may still lie in the
    folder; they are left out.
    """
    if not all(path.exists() for path in (*model_files(out), out / "classifier.pt")):
        return
    files = model_hashes(out)
    extractors = {"own": sha256(out / "classifier.pt")}
    inception = out / "inception.npz"
    if inception.exists():
        extractors["fid"] = load_reference_statistics(inception).metadata["extractor_sha256"]

    def finished(cells: list[Cell]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        found = []
        for cell in cells:
            hashes = files | {"extractor_sha256": extractors["fid" if cell.kind == "fid" else "own"]}
            results = results_of(out, cell, hashes)
            if results is not None:
                found.append((row(cell, results), results))
        return found

    cells = tuning_cells(settings)
    tuned = finished(cells)
    yield from tuned
    if len(tuned) == len(cells):
        guidance = best_guidance(settings, (figures for figures, _ in tuned))
        yield from finished(table_cells(settings, guidance, "fid" in extractors))


def plan(settings: Settings, model: LPDConfig, fid: bool) -> dict[str, dict[str, float]]:
    """Cells, images and PFLOP (the model's matrix products, guidance on) of every kind of cell, and in all."""
    guidance = dict.fromkeys(settings.orders, 2.0)
    cells = [*tuning_cells(settings), *table_cells(settings, guidance, fid)]
    kinds: dict[str, dict[str, float]] = {}
    for kind in [*dict.fromkeys(cell.kind for cell in cells), "all"]:
        chosen = [cell for cell in cells if kind in (cell.kind, "all")]
        flops = [cell.num_images * decoding_flops(model, cell.group_sizes(), cell.cfg != 1) for cell in chosen]
        images = sum(cell.num_images for cell in chosen)
        kinds[kind] = {"cells": len(chosen), "images": images, "pflop": sum(flops) / 1e15}
    return kinds
