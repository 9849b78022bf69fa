"""Evaluation: generate N images over any number of processes and score them in one pass.

Image i has its class, order and random draws from i (and the seed) alone, so neither the batch size nor the number of
processes changes it, and exactly N images are made, none twice. Features are taken on the device from the decoded
images, rounded to bytes as a PNG would be. A killed run continues when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.decoding.decoder import Decoder, resolve_path
from engine.decoding.latency import PUBLISHED_BATCH_SIZE, measure_latency, synchronize
from engine.evaluation.outputs import (
    append_results,
    check_replaceable,
    describe_environment,
    draw_grid,
    grid_indices,
    write_adm_npz,
)
from engine.evaluation.partial_results import BatchResult, PartialResults, read_parts, weights_summary
from engine.scoring.features import INCEPTION, SPATIAL_DIM, FeatureExtractor, load_feature_extractor
from engine.scoring.metrics import NEIGHBOURS, adm_scores, score
from engine.scoring.statistics import FeatureStatistics, ReferenceStatistics, load_reference_statistics
from models.lpd import LPD, LPDConfig
from models.sampling import Sampling
from orders import ORDER_KINDS, default_repulsion, generate_orders, load_orders
from orders.draw import OrderSettings
from tokenizers import VQModel
from util.counter_rng import fold_in
from util.dist import Dist
from util.errors import UserError
from util.files import sha256, write_json
from util.pictures import save_png

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalConfig:
    """What is generated, how it is scored and where the results go; fields are named like the flags."""

    output_dir: Path
    group_sizes: tuple[int, ...]
    num_images: int = 50_000
    eval_bsz: int = 64  # images per process and batch
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    order: str = "lpd"
    proximity_threshold: float = 1.0
    repulsion_threshold: int | None = None
    lpd_order_file: Path | None = None  # image i uses order i of it, whatever `order` says
    seed: int = 0
    bf16: bool = False
    decode_path: str = "auto"  # see engine.decoding.decoder.Decoder
    speed_runs: int = 0  # measured runs for latency (batch 1) and throughput (batch 64), after a fifth of warm-up
    feature_extractor: str | None = INCEPTION  # or a classifier file; None: images without scores
    inception_path: Path | None = None
    reference_statistics: Path | None = None  # None: no Fréchet distance
    adm_suite: bool = False  # sFID, precision and recall too
    save_images: bool = False  # images/000000.png …
    save_npz: bool = False  # samples.npz for the ADM suite
    classes: tuple[str, ...] | None = None  # names in label order

    def __post_init__(self) -> None:
        for name in ("num_images", "eval_bsz"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if self.speed_runs < 0:
            raise UserError(f"--speed_runs is {self.speed_runs}; it must be at least 0 (not measured).")
        if self.order not in ORDER_KINDS:
            raise UserError(f"--order is {self.order!r}; choose one of {', '.join(ORDER_KINDS)}.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}; it must be at least 0 and below 2^63.")
        if self.feature_extractor is None and self.reference_statistics is not None:
            raise UserError(
                f"--reference_statistics {self.reference_statistics} can't be used without a feature extractor."
            )
        if self.adm_suite and (self.feature_extractor != INCEPTION or self.reference_statistics is None):
            raise UserError(f"--adm_suite needs the feature extractor {INCEPTION} and --reference_statistics.")
        if self.adm_suite and self.num_images <= NEIGHBOURS:
            raise UserError(f"--adm_suite needs more images than --num_images {self.num_images}.")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.cfg, self.cfg_schedule, self.temperature, self.top_k, self.top_p)

    def for_epoch(self, epoch: int) -> EvalConfig:
        """The same evaluation with results in a folder of this epoch's own."""
        return dataclasses.replace(self, output_dir=self.output_dir / f"eval_epoch{epoch:04}")

    def settings(self) -> dict[str, Any]:
        """The fields as plain data, for the results."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        del values["classes"]
        return values | {"group_sizes": list(self.group_sizes)}


def image_labels(num_images: int, class_num: int) -> Tensor:
    """Class of every image, int64 (num_images,): sorted and balanced; 50,000 of ImageNet are 50 of each."""
    return torch.arange(num_images) * class_num // num_images


def image_seeds(seed: int, indices: Tensor) -> Tensor:
    """Seeds of images (B,) int64, a function of ``seed`` and the image's number alone."""
    return fold_in(torch.tensor(seed), indices)


@dataclass(frozen=True)
class EvalInputs:
    """The files of an evaluation, loaded and checked."""

    reference: ReferenceStatistics | None
    orders: NDArray[np.integer] | None  # (num, L) of a file; None: drawn on the fly
    extractor: FeatureExtractor | None


def prepare(config: EvalConfig, model: LPDConfig, dist: Dist, extractor: FeatureExtractor | None = None) -> EvalInputs:
    """Check everything about an evaluation that can be checked without the model's weights.

    Args:
        extractor: ``config.feature_extractor``, where it is loaded already.

    Raises:
        UserError: for settings or files that don't fit each other or the model.
    """
    path = config.reference_statistics
    reference = None if path is None else load_reference_statistics(path)
    config.sampling.check(model.vocab_size)
    resolve_path(config.decode_path, dist.device, torch.float32, config.bf16)
    grid = (model.grid_size, model.grid_size)
    repulsion = config.repulsion_threshold
    repulsion = default_repulsion(grid) if repulsion is None else repulsion
    OrderSettings(config.order, grid, config.group_sizes, config.proximity_threshold, repulsion, config.seed)
    if config.classes is not None and len(config.classes) != model.class_num:
        raise UserError(f"{len(config.classes)} class names are given for a model of {model.class_num} classes.")
    orders = None
    if config.lpd_order_file is not None:
        orders = load_orders(config.lpd_order_file, model.grid_size, config.group_sizes)
        if len(orders) < config.num_images:
            raise UserError(
                f"{config.lpd_order_file} holds {len(orders)} orders, too few for {config.num_images} images."
            )
    if config.save_images:
        check_replaceable(config.output_dir / "images")
    if extractor is None and config.feature_extractor is not None:
        extractor = _load_extractor(config.feature_extractor, config.inception_path, dist)
    if reference is not None and extractor is not None:
        reference.check(extractor, model.img_size)
        if config.adm_suite:
            reference.check_adm_suite(model.img_size)
    return EvalInputs(reference, orders, extractor)


def _load_extractor(name: str, inception_path: Path | None, dist: Dist) -> FeatureExtractor:
    loaded: list[FeatureExtractor] = []

    def load() -> None:
        loaded.append(load_feature_extractor(name, dist.device, inception_path))

    dist.on_main(load)  # downloads what is missing
    if not loaded:
        load()
    return loaded[0]


def evaluate(
    model: LPD,
    tokenizer: VQModel,
    config: EvalConfig,
    dist: Dist,
    *,
    record: Mapping[str, Any] | None = None,
    inputs: EvalInputs | None = None,
) -> dict[str, Any]:
    """Generate ``config.num_images`` images, score them, and write everything to ``config.output_dir``.

    All processes call it together; ``output_dir`` must be on a file system they share. It gets ``results.json``, a line
    of ``results.jsonl``, ``grid.png`` and what ``save_images`` and ``save_npz`` ask for. Until it is finished a folder
    ``partial-*`` holds the state (12 kB per image with Inception), from which the same call goes on after a kill.

    Args:
        model, tokenizer: on ``dist.device``. The model is evaluated as it is and left in the mode it came in.
        record: plain data to keep with the results: recipe, checkpoint, its hash, expected figures.
        inputs: of :func:`prepare`, for a check long before or for several evaluations one after the other.

    Returns:
        The content of ``results.json``, on every process: ``frechet_distance`` (and ``fid``, the same number, where the
        features are Inception's), ``inception_score``, ``class_accuracy`` (share of images that the extractor reads as
        the class asked for, where its classes are the model's), ``sfid``, ``precision`` and ``recall`` (with
        ``adm_suite``), ``sec_per_image`` (generating and decoding one image of a batch of ``eval_bsz`` in one process,
        device synchronised, without each process's first batch; None where there is no second), ``images_per_sec`` (all
        processes, scoring included), ``latency_s`` and ``throughput_images_per_sec`` (one process, batch 1 and 64, with
        ``speed_runs``), settings, files with hashes, and versions. A score that can't be computed (too few
        images, no reference) is left out.

    Raises:
        UserError: for settings or files that don't fit, before anything is generated.
    """
    inputs = inputs or prepare(config, model.config, dist)
    evaluation = _Evaluation(model, tokenizer, config, dist, inputs)
    training = model.training
    model.eval()
    try:
        evaluation.generate_missing()
    finally:
        model.train(training)
    return evaluation.finish(dict(record or {}))


class _Evaluation:
    """One call of :func:`evaluate`: checks, generation, results."""

    def __init__(
        self,
        model: LPD,
        tokenizer: VQModel,
        config: EvalConfig,
        dist: Dist,
        inputs: EvalInputs,
    ) -> None:
        self.model, self.tokenizer, self.config, self.dist = model, tokenizer, config, dist
        self.reference, self.orders, self.extractor = inputs.reference, inputs.orders, inputs.extractor
        self.images_dir = config.output_dir / "images"
        self.labels = image_labels(config.num_images, model.config.class_num)
        self.grid_indices = grid_indices(self.labels.numpy())
        fingerprint = dist.broadcast(self._fingerprint())
        self.partial = PartialResults(config.output_dir / f"partial-{fingerprint}")
        self.png_dir = self.partial.folder / "png"

    def _fingerprint(self) -> str:
        """What the images and features depend on: only an evaluation with the same one is continued."""
        settings = self.config.settings()
        for name in ("output_dir", "eval_bsz", "reference_statistics", "inception_path", "speed_runs"):
            del settings[name]
        settings["lpd_order_file"] = self.config.lpd_order_file and sha256(self.config.lpd_order_file)
        settings["feature_extractor"] = self.extractor and self.extractor.weights_hash
        settings["weights"] = [weights_summary(module) for module in (self.model, self.tokenizer)]
        settings["model"] = asdict(self.model.config)
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]

    def generate_missing(self) -> None:
        """Make this process's share of the images that are not there yet."""
        config, dist = self.config, self.dist
        start_time = time.perf_counter()
        done = dist.broadcast(self.partial.done())
        if len(done):
            logger.info("%d of %d images are there already; going on with the rest", len(done), config.num_images)
        missing = np.setdiff1d(np.arange(config.num_images), done)
        batches = [missing[start : start + config.eval_bsz] for start in range(0, len(missing), config.eval_bsz)]
        mine = batches[dist.rank :: dist.world_size]
        decoder = self._decoder(len(mine[0])) if mine else None
        orders = self._draw_orders(np.concatenate([*mine, missing[:0]]))
        with (
            ThreadPoolExecutor() as pool,
            tqdm(
                total=config.num_images, initial=len(done), desc="generating", unit="image", disable=not dist.is_main
            ) as progress,
        ):
            writing: list[Future[None]] = []
            first = 0
            for turn, indices in enumerate(mine):
                assert decoder is not None
                images, seconds = self._generate(decoder, indices, orders[first : first + len(indices)])
                first += len(indices)
                features, logits, spatial = self._extract(images)
                if config.save_images or config.save_npz:
                    pixels = images.cpu().numpy()
                    writing += [pool.submit(self._write_png, *pair) for pair in zip(indices, pixels, strict=True)]
                shown = np.isin(indices, self.grid_indices)
                timed = turn > 0  # the first batch pays for warming up
                self.partial.add(
                    BatchResult(
                        indices,
                        features,
                        logits,
                        spatial,
                        grid_indices=indices[shown],
                        grid_images=images[torch.from_numpy(shown)].cpu().numpy(),
                        timed_images=len(indices) if timed else 0,
                        timed_sec=seconds if timed else 0.0,
                    )
                )
                if turn == len(mine) - 1 or self.partial.due():
                    for future in writing:
                        future.result()  # an image counts as done when its file is there
                    writing = []
                    self.partial.save()
                progress.update(sum(map(len, batches[turn * dist.world_size : (turn + 1) * dist.world_size])))
        dist.barrier()
        self.made, self.wall_sec = len(missing), time.perf_counter() - start_time

    def _draw_orders(self, indices: NDArray[np.int64]) -> NDArray[np.integer]:
        """Orders (B, L) of images; image i has order i of the file, or of the seed."""
        config = self.config
        if self.orders is not None:
            return self.orders[indices]
        return generate_orders(
            config.order,
            len(indices),
            config.group_sizes,
            self.model.config.grid_size,
            config.proximity_threshold,
            config.repulsion_threshold,
            config.seed,
            indices=indices.tolist(),
        )

    def _decoder(self, batch_size: int) -> Decoder:
        config = self.config
        return Decoder(
            self.model,
            config.group_sizes,
            config.sampling,
            batch_size,
            tokenizer=self.tokenizer,
            path=config.decode_path,
            bf16=config.bf16,
        )

    def _generate(
        self, decoder: Decoder, indices: NDArray[np.int64], orders: NDArray[np.integer]
    ) -> tuple[Tensor, float]:
        """Images uint8 (B, H, W, 3) on the device, and the seconds that generating and decoding took."""
        # A decoder runs at one batch size: the last batch is filled up with copies of its last image.
        filled = np.minimum(np.arange(decoder.batch_size), len(indices) - 1)
        rows = torch.from_numpy(indices[filled])
        orders_BL = torch.from_numpy(orders[filled].astype(np.int64))
        synchronize(self.dist.device)
        start = time.perf_counter()
        images = decoder(self.labels[rows], orders_BL, image_seeds(self.config.seed, rows)).images
        synchronize(self.dist.device)
        assert images is not None
        return images[: len(indices)], time.perf_counter() - start

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, logits and spatial features of images uint8 (B, H, W, 3); what is not asked for has no columns."""
        if self.extractor is None:
            return (torch.empty(len(images), 0),) * 3
        features, logits, spatial = self.extractor.with_spatial(images.permute(0, 3, 1, 2))
        return features, logits, spatial if self.config.adm_suite else spatial[:, :0]

    def _write_png(self, index: int, pixels: NDArray[np.uint8]) -> None:
        self.png_dir.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(self.png_dir / f"{index:06}.png", compress_level=1)

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Score what all processes made, write the results and drop the partial state."""
        dist, config = self.dist, self.config
        # One listing for all: a network file system may show processes different ones.
        files, done = dist.broadcast((self.partial.files(), self.partial.done()))
        if not np.array_equal(done, np.arange(config.num_images)):
            raise UserError(
                f"{self.partial.folder} does not hold each of the {config.num_images} images once; all processes must "
                "share its file system and no second evaluation may use it. Delete it to start again."
            )
        results: dict[str, Any] = {"num_images": config.num_images}
        if self.extractor is not None:
            results |= self._scores(files, self.extractor)
        timed_images, timed_sec = read_parts(files, "timing").sum(0).tolist()
        results |= {
            "sec_per_image": timed_sec / timed_images if timed_images else None,
            "images_per_sec": self.made / self.wall_sec if self.made else None,
            **dist.on_main(self._speed),
            "settings": config.settings(),
            "model": asdict(self.model.config),
            "extractor": self.extractor and {"name": self.extractor.name, "sha256": self.extractor.weights_hash},
            "reference": self.reference and {"path": str(self.reference.path), "sha256": self.reference.sha256},
            "order_file_sha256": config.lpd_order_file and sha256(config.lpd_order_file),
            "environment": describe_environment(dist),
            "record": record,
        }
        return dist.on_main(lambda: self._write_outputs(results, files))

    def _speed(self) -> dict[str, Any]:
        """Latency of one image and throughput at batch 64, with pixels; nothing where it is not asked for."""
        runs = self.config.speed_runs
        if runs == 0:
            return {}
        single, batch = (
            measure_latency(self._decoder(size), runs // 5, runs, progress=f"timing batches of {size}")
            for size in (1, PUBLISHED_BATCH_SIZE)
        )
        return {"latency_s": single.median_s, "throughput_images_per_sec": batch.images_per_sec}

    def _scores(self, files: list[Path], extractor: FeatureExtractor) -> dict[str, Any]:
        statistics = self._statistics(files, "features", extractor.feature_dim)
        spatial = self._statistics(files, "spatial", SPATIAL_DIM) if self.config.adm_suite else None

        def compute() -> dict[str, Any]:
            in_order = np.argsort(read_parts(files, "indices"))
            logits = torch.from_numpy(read_parts(files, "logits")[in_order])
            scores = score(statistics, logits, self.reference, extractor.name)
            names = self.config.classes or extractor.classes
            if names is not None and names == extractor.classes and len(names) == self.model.config.class_num:
                scores["class_accuracy"] = float((logits.argmax(1) == self.labels).double().mean())
            if spatial is not None and self.reference is not None:
                features = torch.from_numpy(read_parts(files, "features"))
                scores |= adm_scores(spatial, features, self.reference, extractor, self.config.eval_bsz)
            return scores

        return self.dist.on_main(compute)

    def _statistics(self, files: list[Path], name: str, dim: int) -> FeatureStatistics:
        """Statistics over all images; each process reads its share of the files."""
        statistics = FeatureStatistics(dim, self.dist.device)
        for path in files[self.dist.rank :: self.dist.world_size]:
            statistics.update(torch.from_numpy(read_parts([path], name)))
        statistics.merge_processes(self.dist)
        return statistics

    def _write_outputs(self, results: dict[str, Any], files: list[Path]) -> dict[str, Any]:
        """Write everything and drop the partial state; returns the results as they are on disk."""
        config, folder = self.config, self.config.output_dir
        shown = read_parts(files, "grid_images")[np.argsort(read_parts(files, "grid_indices"))]
        save_png(draw_grid(shown, self.grid_indices, self.labels.numpy(), config.classes), folder / "grid.png")
        # After a kill in the middle of this function the pictures may have been moved already.
        if self.png_dir.exists():
            if config.save_npz:
                write_adm_npz(folder / "samples.npz", self.png_dir, self.labels.numpy(), config.seed)
            if config.save_images:
                shutil.rmtree(self.images_dir, ignore_errors=True)
                os.replace(self.png_dir, self.images_dir)
        # A call that found all images there may be the second after a kill that came when the line was written.
        results = append_results(folder / "results.jsonl", results, again=self.made == 0)
        write_json(folder / "results.json", results)
        finished = self.partial.folder.with_suffix(".finished")  # no half-deleted state is ever continued
        shutil.rmtree(finished, ignore_errors=True)
        os.replace(self.partial.folder, finished)
        shutil.rmtree(finished)
        figures = {key: value for key, value in results.items() if isinstance(value, float)}
        logger.info("%s: %s", folder / "results.json", ", ".join(f"{k} {v:.5g}" for k, v in figures.items()))
        if self.reference is not None:
            logger.info("scored against %s (SHA-256 %s…)", self.reference.path, self.reference.sha256[:12])
        return results
