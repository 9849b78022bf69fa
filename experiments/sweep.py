"""The evaluation sweep: cell after cell of the tables; a cell with results of the present model is not done again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.evaluation.config import EvalConfig
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import open_inputs
from engine.image_generator import ImageGenerator
from engine.scoring.config import ScoringConfig
from engine.scoring.features import INCEPTION, load_feature_extractor
from experiments.cells import (
    Cell,
    Model,
    Scale,
    best_guidance,
    classifier_path,
    file_hashes,
    load_model,
    rows_of,
    table_cells,
    tuning_cells,
)
from models.sampling import Sampling
from orders.config import OrderConfig
from scripts.stages import Stages
from util.dist import Dist

FID_BATCH = 500  # Inception enlarges pictures to 299 pixels


def run_sweep(out: Path, scale: Scale, dist: Dist, inception: Path | None, stages: Stages) -> None:
    """Evaluate the cells that have no results yet; raises OutOfTime between two of them."""
    cuda, classifier = dist.device.type == "cuda", str(classifier_path(out))
    of_classifier = ScoringConfig(feature_extractor=classifier, reference_statistics=out / "reference.npz")
    scorings = {"own": (of_classifier, load_feature_extractor(classifier, dist.device))}
    if inception is not None:
        fid = ScoringConfig(inception_path=inception, reference_statistics=out / "inception.npz")
        scorings["fid"] = fid, load_feature_extractor(INCEPTION, dist.device, inception)

    @functools.cache
    def generator(model: Model) -> ImageGenerator:
        return load_model(out, scale, model, dist.device)

    def evaluate_missing(cells: Sequence[Cell]) -> list[dict[str, Any]]:
        for number, cell in enumerate(cells, start=1):
            if not rows_of(out, [cell]):
                stages.check(f"cell {number} of {len(cells)}, {cell.name}")
                print(f"-- cell {number} of {len(cells)}: {cell.name}", flush=True)
                evaluate_cell(cell)
        return rows_of(out, cells)

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
        trained, record = generator(cell.model), asdict(cell) | file_hashes(out, cell.model)
        inputs = open_inputs(config, trained.model.config, dist, trained.classes, extractor)
        evaluate(trained.model, trained.tokenizer, config, inputs, dist, record=record)

    guidance = best_guidance(evaluate_missing(tuning_cells(scale)))
    print("guidance:", ", ".join(f"{model} {order} {cfg:g}" for (model, order), cfg in guidance.items()), flush=True)
    evaluate_missing(table_cells(scale, guidance, inception is not None))
