"""The evaluation sweep: one model, loaded once, generates and scores cell after cell of the table.

A cell is one combination of order, number of steps, guidance, thresholds and seed. Its results are in a folder of its
own; a cell with results of the present model is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.evaluation.config import EvalConfig
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import open_inputs
from engine.image_generator import ImageGenerator
from engine.scoring.config import ScoringConfig
from engine.scoring.features import INCEPTION, load_feature_extractor
from experiments.cifar10.scales import ABLATION_STEPS, GRID, IMG_SIZE, OWN_STEPS, STRIDE, Scale
from models.flops import decoding_flops
from models.lpd import LPDConfig
from models.sampling import Sampling
from orders import default_repulsion, group_sizes, natural_group_sizes
from orders.config import OrderConfig
from scripts.stages import Stages
from util.dist import Dist
from util.files import sha256

DEFAULT_REPULSION, DEFAULT_PROXIMITY = default_repulsion(GRID), 1.0
FID_BATCH = 500  # Inception enlarges pictures to 299 pixels
FIGURES = ("frechet_distance", "fid", "inception_score", "class_accuracy", "sec_per_image", "images_per_sec")


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

    def row(self, results: dict[str, Any]) -> dict[str, Any]:
        """The cell and its figures in one flat dict."""
        return asdict(self) | {"name": self.name} | {name: results[name] for name in FIGURES if name in results}


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
        cell("ablation", "lpd", ABLATION_STEPS, repulsion=repulsion, proximity=proximity)
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


def model_files(out: Path) -> dict[str, Path]:
    """What the results of an output folder depend on."""
    tokenizer, classifier = out / "tokenizer" / "tokenizer.pt", out / "classifier.pt"
    return {"checkpoint": out / "lpd" / "checkpoint-last.pth", "tokenizer": tokenizer, "classifier": classifier}


def file_hashes(out: Path) -> dict[str, str]:
    return {f"{name}_sha256": sha256(path) for name, path in model_files(out).items()}


def rows_of(out: Path, cells: Sequence[Cell], hashes: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the cells that have results of the files with these hashes."""
    paths = {cell: out / "eval" / cell.name / "results.json" for cell in cells}
    found = {cell: json.loads(path.read_text()) for cell, path in paths.items() if path.exists()}
    return [cell.row(results) for cell, results in found.items() if results["record"] == asdict(cell) | hashes]


def finished_rows(out: Path, scale: Scale) -> list[dict[str, Any]]:
    """The rows of all cells that have results, in the order of the cells.

    Left out are results of an earlier model, tokenizer or classifier, and of another guidance than the tuned one.
    """
    hashes, cells = file_hashes(out), tuning_cells(scale)
    tuned = rows_of(out, cells, hashes)
    if len(tuned) < len(cells):
        return tuned
    return tuned + rows_of(out, table_cells(scale, best_guidance(scale, tuned), fid=True), hashes)


def run_sweep(out: Path, scale: Scale, dist: Dist, inception: Path | None, stages: Stages) -> None:
    """Evaluate the cells that have no results yet; raises OutOfTime between two of them."""
    hashes, files = file_hashes(out), model_files(out)
    trained = ImageGenerator(files["checkpoint"], files["tokenizer"], device=str(dist.device))
    cuda = dist.device.type == "cuda"
    own = ScoringConfig(feature_extractor=str(files["classifier"]), reference_statistics=out / "reference.npz")
    scorings = {"own": (own, load_feature_extractor(str(files["classifier"]), dist.device))}
    if inception is not None:
        fid = ScoringConfig(inception_path=inception, reference_statistics=out / "inception.npz")
        scorings["fid"] = fid, load_feature_extractor(INCEPTION, dist.device, inception)

    def evaluate_missing(cells: Sequence[Cell]) -> list[dict[str, Any]]:
        for number, cell in enumerate(cells, start=1):
            if not rows_of(out, [cell], hashes):
                stages.check(f"cell {number} of {len(cells)}, {cell.name}")
                print(f"-- cell {number} of {len(cells)}: {cell.name}", flush=True)
                evaluate_cell(cell)
        return rows_of(out, cells, hashes)

    def evaluate_cell(cell: Cell) -> None:
        scoring, extractor = scorings["fid" if cell.kind == "fid" else "own"]
        config = EvalConfig(
            output_dir=out / "eval" / cell.name,
            num_images=cell.num_images,
            eval_bsz=min(scale.eval_bsz, FID_BATCH) if cell.kind == "fid" else scale.eval_bsz,
            seed=cell.seed,
            bf16=cuda,
            # Large batches keep a GPU busy; capturing a graph for the few of a cell would cost more than it saves.
            decode_path="compiled" if cuda else "auto",
            orders=OrderConfig(
                order=cell.order,
                group_sizes=cell.group_sizes(),
                proximity_threshold=cell.proximity,
                repulsion_threshold=cell.repulsion,
            ),
            sampling=Sampling(cfg=cell.cfg),
            scoring=scoring,
        )
        inputs = open_inputs(config, trained.model.config, dist, trained.classes, extractor)
        evaluate(trained.model, trained.tokenizer, config, inputs, dist, record=asdict(cell) | hashes)

    guidance = best_guidance(scale, evaluate_missing(tuning_cells(scale)))
    print("guidance:", ", ".join(f"{order} {cfg:g}" for order, cfg in guidance.items()), flush=True)
    evaluate_missing(table_cells(scale, guidance, inception is not None))


def plan(scale: Scale, model: LPDConfig, fid: bool) -> Iterator[tuple[str, int, int, float]]:
    """(kind, cells, images, PFLOP of the model's matrix products with guidance) of every kind of cell, then of all."""
    cells = [*tuning_cells(scale), *table_cells(scale, dict.fromkeys(scale.orders, 2.0), fid)]
    for kind in [*dict.fromkeys(cell.kind for cell in cells), "all"]:
        chosen = [cell for cell in cells if kind in (cell.kind, "all")]
        flops = sum(cell.num_images * decoding_flops(model, cell.group_sizes(), cell.cfg != 1) for cell in chosen)
        yield kind, len(chosen), sum(cell.num_images for cell in chosen), flops / 1e15
