"""The evaluation sweep: one model, loaded once, generates and scores cell after cell of the table.

A cell is one combination of order, number of steps, guidance, thresholds and seed. Its results are in a folder of its
own; a cell with results of the present files is not done again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.evaluation.config import EvalConfig
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import open_inputs
from engine.scoring.config import ScoringConfig
from engine.scoring.features import INCEPTION, load_feature_extractor
from engine.scoring.statistics import load_reference_statistics
from experiments.cifar10.scales import GRID, IMG_SIZE, OWN_STEPS, STRIDE, Scale
from models.flops import decoding_flops
from models.lpd import LPD, LPDConfig, load_weights
from models.sampling import Sampling
from orders import default_repulsion, group_sizes, natural_group_sizes
from orders.config import OrderConfig
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

    @property
    def features(self) -> str:
        """What it is scored by: own, the classifier, or fid, Inception."""
        return "fid" if self.kind == "fid" else "own"

    def group_sizes(self) -> tuple[int, ...]:
        """The schedule of this number of steps, the same for all orders; of ``own`` cells that of the order's paper."""
        own = self.kind == "own"
        return natural_group_sizes(self.order, GRID) if own else group_sizes(IMG_SIZE, self.steps, STRIDE)


def tuning_cells(scale: Scale) -> list[Cell]:
    """Every order with every guidance scale, on a seed that no reported cell has."""
    return [
        Cell("tuning", order, scale.tuning_steps, cfg, scale.tuning_images, scale.tuning_seed)
        for order in scale.orders
        for cfg in scale.cfgs
    ]


def table_cells(scale: Scale, guidance: dict[str, float], fid: bool) -> list[Cell]:
    """All reported cells at the tuned guidance of their order, the most telling first."""

    def cell(kind: str, order: str, steps: int, seed: int = scale.seeds[0], **thresholds: Any) -> Cell:
        return Cell(kind, order, steps, guidance[order], scale.num_images, seed, **thresholds)

    repeated_orders = {order for order, _ in scale.repeated}
    main = [order for order in scale.orders if order in repeated_orders]
    others = [order for order in scale.orders if order not in repeated_orders]
    cells = [cell("table", order, steps) for order in main for steps in scale.steps]
    cells += [cell("repeat", order, steps, seed) for seed in scale.seeds[1:] for order, steps in scale.repeated]
    cells += [
        cell("ablation", "lpd", 20, repulsion=repulsion, proximity=proximity)
        for repulsion in scale.repulsions
        for proximity in scale.proximities
        if (repulsion, proximity) != (DEFAULT_REPULSION, DEFAULT_PROXIMITY)  # in the table
    ]
    cells += [cell("table", order, steps) for order in others for steps in scale.steps]
    cells += [cell("own", order, len(natural_group_sizes(order, GRID))) for order in others if order in OWN_STEPS]
    if fid:
        cells += [cell("fid", order, steps) for order in scale.orders for steps in scale.steps]
    return cells


def best_guidance(scale: Scale, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The scale of least Fréchet distance of every order, from the rows of the tuning cells."""
    tuned = [row for row in rows if row["kind"] == "tuning"]
    return {
        order: min((row for row in tuned if row["order"] == order), key=lambda row: row["frechet_distance"])["cfg"]
        for order in scale.orders
    }


def model_files(out: Path) -> tuple[Path, Path]:
    """Checkpoint and tokenizer of an output folder."""
    return out / "lpd" / "checkpoint-last.pth", out / "tokenizer" / "tokenizer.pt"


def file_hashes(out: Path) -> dict[str, dict[str, str]]:
    """Hashes of the present files that results depend on, by the features of the cell.

    Features whose files do not exist yet are left out.
    """
    checkpoint, tokenizer = model_files(out)
    classifier, inception = out / "classifier.pt", out / "inception.npz"
    if not all(path.exists() for path in (checkpoint, tokenizer, classifier)):
        return {}
    models = {"checkpoint_sha256": sha256(checkpoint), "tokenizer_sha256": sha256(tokenizer)}
    hashes = {"own": models | {"extractor_sha256": sha256(classifier)}}
    if inception.exists():
        extractor = load_reference_statistics(inception).metadata["extractor_sha256"]
        hashes["fid"] = models | {"extractor_sha256": extractor}
    return hashes


def results_of(out: Path, cell: Cell, hashes: dict[str, dict[str, str]]) -> dict[str, Any] | None:
    """The results of a cell; None if there are none, or they were made with other files."""
    path = out / "eval" / cell.name / "results.json"
    if not path.exists() or cell.features not in hashes:
        return None
    results = json.loads(path.read_text())
    return results if results["record"] == dataclasses.asdict(cell) | hashes[cell.features] else None


def finished_rows(out: Path, scale: Scale) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(row, all results) of every cell that has results, in the order of the cells.

    Left out are results of an earlier model, tokenizer or extractor, and of another guidance than the tuned one.
    """
    hashes = file_hashes(out)

    def finished(cells: list[Cell]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        found = ((cell, results_of(out, cell, hashes)) for cell in cells)
        return [(row(cell, results), results) for cell, results in found if results is not None]

    cells = tuning_cells(scale)
    tuned = finished(cells)
    yield from tuned
    if len(tuned) == len(cells):
        guidance = best_guidance(scale, (figures for figures, _ in tuned))
        yield from finished(table_cells(scale, guidance, "fid" in hashes))


def row(cell: Cell, results: dict[str, Any]) -> dict[str, Any]:
    """A cell and its figures in one flat dict."""
    figures = ("frechet_distance", "fid", "inception_score", "class_accuracy", "sec_per_image", "images_per_sec")
    return dataclasses.asdict(cell) | {name: results[name] for name in figures if name in results}


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell whose figures a row holds."""
    return Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})


class Sweep:
    """Model, tokenizer and extractors of one output folder, and the cells they evaluate."""

    def __init__(self, out: Path, scale: Scale, dist: Dist, inception_path: Path | None) -> None:
        self.out, self.scale, self.dist, self.inception_path = out, scale, dist, inception_path
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
        self.hashes = file_hashes(out)

    def run(self, clock: Clock) -> None:
        """Evaluate what is missing; raises OutOfTime between two cells."""
        tuning = tuning_cells(self.scale)
        self._evaluate_all(tuning, clock)
        guidance = best_guidance(self.scale, (row(cell, self._results(cell) or {}) for cell in tuning))
        print("guidance:", ", ".join(f"{order} {cfg:g}" for order, cfg in guidance.items()), flush=True)
        self._evaluate_all(table_cells(self.scale, guidance, self.inception_path is not None), clock)

    def _evaluate_all(self, cells: list[Cell], clock: Clock) -> None:
        for number, cell in enumerate(cells, start=1):
            if self._results(cell) is None:
                clock.check(f"cell {number} of {len(cells)}, {cell.name}")
                print(f"-- cell {number} of {len(cells)}: {cell.name}", flush=True)
                self._evaluate(cell)

    def _results(self, cell: Cell) -> dict[str, Any] | None:
        return results_of(self.out, cell, self.hashes)

    def _evaluate(self, cell: Cell) -> None:
        inception = cell.kind == "fid"
        config = EvalConfig(
            output_dir=self.out / "eval" / cell.name,
            num_images=cell.num_images,
            eval_bsz=min(self.scale.eval_bsz, FID_BATCH) if inception else self.scale.eval_bsz,
            seed=cell.seed,
            bf16=self.dist.device.type == "cuda",
            # Large batches keep a GPU busy; capturing a graph for the few of a cell would cost more than it saves.
            decode_path="compiled" if self.dist.device.type == "cuda" else "auto",
            orders=OrderConfig(
                order=cell.order,
                group_sizes=cell.group_sizes(),
                proximity_threshold=cell.proximity,
                repulsion_threshold=cell.repulsion,
            ),
            sampling=Sampling(cfg=cell.cfg),
            scoring=ScoringConfig(
                feature_extractor=INCEPTION if inception else str(self.out / "classifier.pt"),
                inception_path=self.inception_path,
                reference_statistics=self.out / ("inception.npz" if inception else "reference.npz"),
            ),
        )
        inputs = open_inputs(config, self.model.config, self.dist, self.classes, self.extractors[cell.features])
        record = dataclasses.asdict(cell) | self.hashes[cell.features]
        evaluate(self.model, self.tokenizer, config, inputs, self.dist, record=record)


def plan(scale: Scale, model: LPDConfig, fid: bool) -> Iterator[tuple[str, int, int, float]]:
    """(kind, cells, images, PFLOP of the model's matrix products with guidance) of every kind of cell, then of all."""
    cells = [*tuning_cells(scale), *table_cells(scale, dict.fromkeys(scale.orders, 2.0), fid)]
    for kind in [*dict.fromkeys(cell.kind for cell in cells), "all"]:
        chosen = [cell for cell in cells if kind in (cell.kind, "all")]
        flops = sum(cell.num_images * decoding_flops(model, cell.group_sizes(), cell.cfg != 1) for cell in chosen)
        yield kind, len(chosen), sum(cell.num_images for cell in chosen), flops / 1e15
