"""What an experiment on photographs trains and evaluates: its scale, and the cells of its tables.

A cell is one combination of model, order, number of steps, guidance, thresholds and seed. Its results lie in a folder
of its own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from engine.image_generator import ImageGenerator
from models.flops import decoding_flops
from models.lpd import LPDConfig
from orders import default_repulsion, natural_group_sizes
from orders.schedule import grid_group_sizes
from util.checkpoint import LAST
from util.errors import UserError, reading
from util.files import sha256
from util.readers import read_json

NAMES = {
    "lpd": "locality-aware",
    "random": "random",
    "halton": "Halton",
    "raster": "raster",
    "checkerboard": "checkerboard",
    "par": "region-parallel",
    "zipar": "diagonal",
    "nar": "neighbouring",
    "lpd_near_only": "near context only",
    "lpd_far_only": "far apart only",
}
OWN_STEPS = ("par", "zipar", "nar")  # their geometry gives them a number of steps of their own
DEFAULT_PROXIMITY = 1.0
FIGURES = ("frechet_distance", "fid", "inception_score", "class_accuracy", "sec_per_image", "images_per_sec")


@dataclass(frozen=True)
class Model:
    """A trained model that is evaluated, and in which of the scale's orders and steps: in all where they are None."""

    training: str = "lpd"  # the folder it was trained in
    epoch: int | None = None  # of a checkpoint that was kept on the way; None: the last
    orders: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return self.training if self.epoch is None else f"{self.training}_epoch{self.epoch}"

    def checkpoint(self, out: Path) -> Path:
        return out / self.training / (LAST if self.epoch is None else f"checkpoint-{self.epoch}.pth")

    def takes(self, order: str, steps: int | None = None) -> bool:
        """Whether it is evaluated in this order, and at this number of steps."""
        in_steps = steps is None or self.steps is None or steps in self.steps
        return in_steps and (self.orders is None or order in self.orders)


@dataclass(frozen=True)
class Scale:
    """An experiment at one scale."""

    img_size: int
    stride: int
    flags: dict[str, tuple[str, ...]]  # of the commands of the stages
    orders: tuple[str, ...]
    steps: tuple[int, ...]
    num_images: int  # per cell
    eval_bsz: int
    cfgs: tuple[float, ...]  # guidance scales to choose from
    tuning_images: int
    tuning_steps: int
    tuning_seed: int  # none of `seeds`
    seeds: tuple[int, ...]  # the first for all cells, the others for `repeated`
    repeated: tuple[tuple[str, int], ...]  # (order, steps) of the main rows
    ablation_steps: tuple[int, ...]  # of the first model, with locality-aware orders
    repulsions: tuple[int, ...]
    proximities: tuple[float, ...]
    subset: int | None = None  # photos per split; None: all
    variant: str = ""  # added to the names of the published page and pictures
    trainings: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"lpd": ()})  # and the flags of each
    models: tuple[Model, ...] = (Model(),)

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.img_size // self.stride

    @property
    def summary(self) -> str:
        """What ``--help`` says of it."""
        text = f"{self.grid}×{self.grid} tokens, {self.num_images:,} images per cell"
        return text if self.subset is None else f"{text} and {self.subset} photos, only to see that everything runs"

    def used(self, photos: int) -> int:
        """How many of a split's photos are used."""
        return photos if self.subset is None else min(photos, self.subset)

    @property
    def use_ema(self) -> bool:
        """Whether the moving average of the weights is what is evaluated."""
        return float(self.flag("lpd", "--ema", "0")) > 0

    @property
    def default_thresholds(self) -> tuple[int, float]:
        """Repulsion and proximity of the cells that are no ablation."""
        return default_repulsion(self.grid), DEFAULT_PROXIMITY

    def for_epochs(self, epochs: int) -> Scale:
        """The same with LPD trainings of another length; checkpoints are kept and evaluated at the same shares of it.

        Raises:
            UserError: where these are no whole numbers of epochs.
        """
        before, freq = int(self.flag("lpd", "--epochs")), int(self.flag("lpd", "--save_intermediate_freq", "0"))
        if epochs < 1 or freq * epochs % before:
            raise UserError(
                f"--epochs is {epochs}; it must be a positive multiple of {before // math.gcd(freq, before)}."
            )
        words = ("--epochs", str(epochs), *(("--save_intermediate_freq", str(freq * epochs // before)) if freq else ()))
        models = (replace(model, epoch=model.epoch and model.epoch * epochs // before) for model in self.models)
        return replace(self, flags=self.flags | {"lpd": (*self.flags["lpd"], *words)}, models=tuple(models))

    def flag(self, stage: str, name: str, default: str = "") -> str:
        """The value of a flag of a stage's commands; the last one counts."""
        return dict(itertools.pairwise(self.flags[stage])).get(name, default)


@dataclass(frozen=True)
class Cell:
    """One evaluation. ``kind``: tuning (of guidance), table, repeat (another seed), ablation, own (steps), or fid."""

    kind: str
    order: str
    steps: int
    cfg: float
    num_images: int
    seed: int
    grid: int
    repulsion: int
    proximity: float = DEFAULT_PROXIMITY
    training: str = "lpd"
    epoch: int | None = None

    @property
    def model(self) -> Model:
        return Model(self.training, self.epoch)

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.kind, self.order, f"{self.steps}steps", f"cfg{self.cfg:g}", f"seed{self.seed}"]
        if self.model != Model():
            parts.insert(0, self.model.name)
        if (self.repulsion, self.proximity) != (default_repulsion(self.grid), DEFAULT_PROXIMITY):
            parts.append(f"repulsion{self.repulsion}_proximity{self.proximity:g}")
        return "_".join(parts)

    def group_sizes(self) -> tuple[int, ...]:
        """The schedule of this number of steps, the same for all orders; of ``own`` cells that of the order's paper."""
        own = self.kind == "own"
        return natural_group_sizes(self.order, self.grid) if own else grid_group_sizes(self.grid, self.steps)

    def row(self, results: dict[str, Any]) -> dict[str, Any]:
        """The cell and its figures in one flat dict. ValueError for results that are none."""
        about = asdict(self) | {"name": self.name, "model": self.model.name}
        figures = {name: results[name] for name in FIGURES if results.get(name) is not None}
        if "frechet_distance" not in figures:
            raise ValueError("no Fréchet distance")
        for name, value in figures.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}, no finite number")
        return about | figures


Guidance = dict[tuple[str, str], float]  # by the name of the model and the order


def tuning_cells(scale: Scale) -> list[Cell]:
    """Every model and order with every guidance scale, on a seed that no reported cell has."""
    return [
        Cell(
            "tuning", order, scale.tuning_steps, cfg, scale.tuning_images, scale.tuning_seed, scale.grid,
            *scale.default_thresholds, model.training, model.epoch,
        )
        for model in scale.models
        for order in scale.orders
        if model.takes(order)
        for cfg in scale.cfgs
    ]  # fmt: skip


def table_cells(scale: Scale, guidance: Guidance, fid: bool) -> list[Cell]:
    """All reported cells at the tuned guidance of their model and order, the most telling first."""

    def cell(
        kind: str, model: Model, order: str, steps: int, seed: int = scale.seeds[0],
        thresholds: tuple[int, float] = scale.default_thresholds,
    ) -> Cell:  # fmt: skip
        cfg = guidance[model.name, order]
        return Cell(
            kind, order, steps, cfg, scale.num_images, seed, scale.grid, *thresholds, model.training, model.epoch
        )

    repeated_orders = {order for order, _ in scale.repeated}
    pairs = [(model, order) for model in scale.models for order in scale.orders if model.takes(order)]
    main = [(model, order) for model, order in pairs if order in repeated_orders]
    others = [(model, order) for model, order in pairs if order not in repeated_orders]
    cells = [cell("table", *pair, steps) for pair in main for steps in pair[0].steps or scale.steps]
    cells += [
        cell("repeat", model, order, steps, seed)
        for seed in scale.seeds[1:]
        for model in scale.models
        for order, steps in scale.repeated
        if model.takes(order, steps)
    ]
    cells += [
        cell("ablation", scale.models[0], "lpd", steps, thresholds=(repulsion, proximity))
        for steps in scale.ablation_steps
        for repulsion in scale.repulsions
        for proximity in scale.proximities
        if (repulsion, proximity) != scale.default_thresholds  # in the table
    ]
    cells += [cell("table", *pair, steps) for pair in others for steps in pair[0].steps or scale.steps]
    cells += [
        cell("own", model, order, len(natural_group_sizes(order, scale.grid)))
        for model, order in others
        if order in OWN_STEPS
    ]
    if fid:
        cells += [cell("fid", scale.models[0], order, steps) for order in scale.orders for steps in scale.steps]
    return cells


def best_guidance(rows: Iterable[dict[str, Any]]) -> Guidance:
    """The scale of least Fréchet distance of every model and order, from the rows of the tuning cells."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["model"], row["order"]
        if row["kind"] == "tuning" and (key not in best or row["frechet_distance"] < best[key]["frechet_distance"]):
            best[key] = row
    return {key: row["cfg"] for key, row in best.items()}


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, size: int, modified: int) -> str:
    return sha256(path)


def file_hashes(out: Path, model: Model) -> dict[str, str]:
    """SHA-256 of what the results of a model depend on."""
    paths = {"checkpoint": model.checkpoint(out), "tokenizer": tokenizer_path(out), "classifier": classifier_path(out)}
    stats = {path: path.stat() for path in paths.values()}
    return {
        f"{name}_sha256": _sha256_of(path, stats[path].st_size, stats[path].st_mtime_ns) for name, path in paths.items()
    }


def load_model(out: Path, scale: Scale, model: Model, device: torch.device) -> ImageGenerator:
    """A trained model with the experiment's tokenizer."""
    checkpoint = model.checkpoint(out)
    return ImageGenerator(checkpoint, tokenizer_path(out), use_ema=scale.use_ema, device=str(device))


def tokenizer_path(out: Path) -> Path:
    return out / "tokenizer" / "tokenizer.pt"


def classifier_path(out: Path) -> Path:
    return out / "classifier.pt"


def rows_of(out: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The rows of the cells that have results of the present model, tokenizer and classifier."""
    rows = []
    for cell in cells:
        path = out / "eval" / cell.name / "results.json"
        if path.exists() and cell.model.checkpoint(out).exists():
            present = asdict(cell) | file_hashes(out, cell.model)
            with reading("results", path):
                results = read_json("results", path)
                if results["record"] == present:
                    rows.append(cell.row(results))
    return rows


def finished_rows(out: Path, scale: Scale) -> list[dict[str, Any]]:
    """The rows of all cells that have results, in the order of the cells.

    Left out are results of an earlier model, tokenizer or classifier, and of another guidance than the tuned one.
    """
    cells = tuning_cells(scale)
    tuned = rows_of(out, cells)
    if len(tuned) < len(cells):
        return tuned
    return tuned + rows_of(out, table_cells(scale, best_guidance(tuned), fid=True))


def plan(scale: Scale, model: LPDConfig, fid: bool) -> Iterator[tuple[str, int, int, float]]:
    """(kind, cells, images, PFLOP of the matrix products with guidance) of every kind of cell, then of all."""
    tuning = tuning_cells(scale)
    guidance = {(cell.model.name, cell.order): 2.0 for cell in tuning}
    cells = [*tuning, *table_cells(scale, guidance, fid)]
    for kind in [*dict.fromkeys(cell.kind for cell in cells), "all"]:
        chosen = [cell for cell in cells if kind in (cell.kind, "all")]
        flops = sum(cell.num_images * decoding_flops(model, cell.group_sizes(), cell.cfg != 1) for cell in chosen)
        yield kind, len(chosen), sum(cell.num_images for cell in chosen), flops / 1e15
