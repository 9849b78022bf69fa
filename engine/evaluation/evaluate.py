"""Evaluation: generate N images over any number of processes and score them in one pass.

Image i has its class, order and random draws from i (and the seed) alone, so neither the batch size nor the number of
processes changes it, and exactly N images are made, none twice. Features are taken on the device from the decoded
images, rounded to bytes as a PNG would be. A killed run is resumed by the same command.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import util.config
from engine.decoding.decoder import Decoder
from engine.decoding.latency import PUBLISHED_BATCH_SIZE, measure_latency, synchronize
from engine.evaluation.config import EvalConfig
from engine.evaluation.inputs import EvalInputs
from engine.evaluation.outputs import (
    append_results,
    describe_environment,
    draw_grid,
    grid_indices,
    write_adm_npz,
    write_labels,
)
from engine.evaluation.partial_results import BatchResult, PartialResults, read_parts, weights_summary
from engine.scoring.features import SPATIAL_DIM, FeatureExtractor
from engine.scoring.metrics import adm_scores, conventions, score
from engine.scoring.statistics import FeatureStatistics
from models.lpd import LPD
from models.sampling import image_seeds
from tokenizers import VQModel
from util.dist import Dist
from util.errors import UserError
from util.files import atomic_write, refuse_link, sha256, write_json
from util.pictures import picture_name, save_png

logger = logging.getLogger(__name__)

MOVED = "moved"  # in the partial state: its pictures were about to become the folder of images


def image_labels(num_images: int, class_num: int) -> Tensor:
    """Class of every image, int64 (num_images,): sorted and balanced; 50,000 of ImageNet are 50 of each."""
    return torch.arange(num_images) * class_num // num_images


def evaluate(
    model: LPD,
    tokenizer: VQModel,
    config: EvalConfig,
    inputs: EvalInputs,
    dist: Dist,
    *,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate ``config.num_images`` images, score them, and write everything to ``config.output_dir``.

    All processes call it together; ``output_dir`` must be on a file system they share. It gets ``results.json``, a line
    of ``results.jsonl``, ``grid.png`` and what ``save_images`` and ``save_npz`` ask for. Until it is finished a folder
    ``partial-*`` holds the state (12 kB per image with Inception), from which the same call resumes after a kill.

    Args:
        model, tokenizer: on ``dist.device``. The model is evaluated as it is and left in the mode it came in.
        inputs: of :func:`open_inputs`.
        record: plain data to keep with the results: recipe, checkpoint, its hash, expected figures.

    Returns:
        The content of ``results.json``, on every process: ``frechet_distance`` (and ``fid``, the same number, where the
        features are Inception's), ``inception_score``, ``class_accuracy`` (share of images that the extractor reads as
        the class asked for, where its classes are the model's), ``sfid``, ``precision`` and ``recall`` (with
        ``adm_suite``), ``sec_per_image`` (generating and decoding one image of a batch of ``eval_bsz`` in one process,
        device synchronised, without each process's first batch; None where there is no second), ``images_per_sec`` (all
        processes, scoring included), ``latency_s`` and ``throughput_images_per_sec`` (one process, batch 1 and 64, with
        ``speed_runs``), settings, files with hashes, and versions. A score that can't be computed (too few
        images, no reference) is left out.
    """
    evaluation = _Evaluation(model, tokenizer, config, inputs, dist)
    training = model.training
    model.eval()
    try:
        evaluation.generate_missing()
    finally:
        model.train(training)
    return evaluation.finish(dict(record or {}))


class _Evaluation:
    """One call of :func:`evaluate`: checks, generation, results."""

    def __init__(self, model: LPD, tokenizer: VQModel, config: EvalConfig, inputs: EvalInputs, dist: Dist) -> None:
        self.model, self.tokenizer, self.config, self.dist = model, tokenizer, config, dist
        self.orders, self.reference, self.extractor = inputs.orders, inputs.reference, inputs.extractor
        self.classes = inputs.classes
        self.class_names = self.classes or [f"class {label}" for label in range(model.config.class_num)]
        sizes = self.orders.group_sizes
        # The schedule and the orders are recorded as they are used, whatever flag or file they come from.
        self.recorded = util.config.record(config) | config.orders.used(self.orders.spec)
        self.recorded |= {"group_sizes": list(sizes), "generation_steps": len(sizes)}
        order_file = config.orders.lpd_order_file
        self.order_file_sha256 = None if order_file is None else sha256(order_file)
        self.images_dir = config.output_dir / "images"
        self.labels = image_labels(config.num_images, model.config.class_num)
        self.grid_indices = grid_indices(self.labels.numpy())
        fingerprint = dist.broadcast(self._fingerprint())
        folder = config.output_dir / f"partial-{fingerprint}"
        self.png_dir = folder / "png"
        kept = config.save_images or config.save_npz
        self.partial = PartialResults(folder, self.png_dir if kept else None, self._png_name)

    def _fingerprint(self) -> str:
        """What the images and features depend on: only an evaluation with the same one is resumed."""
        free = (
            *("output_dir", "eval_bsz", "reference_statistics", "inception_path", "speed_runs"),
            *("generation_steps", "schedule_file"),  # which are in the orders' spec
        )
        asked = util.config.record(self.config) | {"orders": asdict(self.orders.spec)}
        depends_on = {name: value for name, value in asked.items() if name not in free}
        depends_on["lpd_order_file"] = self.order_file_sha256
        depends_on["feature_extractor"] = self.extractor and self.extractor.weights_hash
        depends_on["weights"] = [weights_summary(module) for module in (self.model, self.tokenizer)]
        depends_on["model"] = asdict(self.model.config)
        return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]

    def generate_missing(self) -> None:
        """Make this process's share of the images that are not there yet."""
        config, dist = self.config, self.dist
        start_time = time.perf_counter()
        done = dist.on_main(self._repair)
        if len(done):
            logger.info("%d of %d images are there already; making the rest", len(done), config.num_images)
        missing = np.setdiff1d(np.arange(config.num_images), done)
        batches = [missing[start : start + config.eval_bsz] for start in range(0, len(missing), config.eval_bsz)]
        bar = tqdm(
            total=config.num_images, initial=len(done), desc="generating", unit="image", disable=not dist.is_main
        )
        with bar, ThreadPoolExecutor() as pool:
            for turn, made in enumerate(self._make(batches[dist.rank :: dist.world_size], pool)):
                self.partial.add(made.arrays())
                bar.update(sum(map(len, batches[turn * dist.world_size : (turn + 1) * dist.world_size])))
        dist.barrier()
        self.made, self.wall_sec = len(missing), time.perf_counter() - start_time

    def _make(self, batches: list[NDArray[np.int64]], pool: ThreadPoolExecutor) -> Iterator[BatchResult]:
        """Generate batches of images, given by their numbers, and take their features; PNG files are written beside."""
        if not batches:
            return
        decoder, numbers = self._decoder(len(batches[0])), np.concatenate(batches)
        orders = np.split(self.orders.of_images(numbers), np.cumsum([len(batch) for batch in batches])[:-1])
        writing: list[Future[None]] = []
        for turn, (indices, orders_BL) in enumerate(zip(batches, orders, strict=True)):
            images, seconds = self._generate(decoder, indices, orders_BL)
            features, logits, spatial = self._extract(images)
            if self.partial.png_dir is not None:
                pixels = images.cpu().numpy()
                writing += [pool.submit(self._write_png, *pair) for pair in zip(indices, pixels, strict=True)]
            shown = np.isin(indices, self.grid_indices)
            timed = turn > 0  # the first batch pays for warming up
            yield BatchResult(
                indices,
                features,
                logits,
                spatial,
                grid_indices=indices[shown],
                grid_images=images[torch.from_numpy(shown)].cpu().numpy(),
                timed_images=len(indices) if timed else 0,
                timed_sec=seconds if timed else 0.0,
            )
            if turn == len(batches) - 1 or self.partial.due():
                for future in writing:
                    future.result()  # an image counts as done when its file is there
                writing = []
                self.partial.save()

    def _repair(self) -> NDArray[np.int64]:
        """Numbers of the images that are there already, whole."""
        for path in (self.partial.folder, self.png_dir, self.images_dir):
            refuse_link(path)
        if (self.partial.folder / MOVED).exists() and self.images_dir.exists() and not self.png_dir.exists():
            os.replace(self.images_dir, self.png_dir)  # a kill came when the results were written
        return self.partial.repair()

    def _decoder(self, batch_size: int) -> Decoder:
        config = self.config
        return Decoder(
            self.model,
            self.orders.group_sizes,
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
        return features, logits, spatial if self.config.scoring.adm_suite else spatial[:, :0]

    def _write_png(self, index: int, pixels: NDArray[np.uint8]) -> None:
        with atomic_write(self.partial.picture(index)) as file:
            Image.fromarray(pixels).save(file, format="PNG", compress_level=1)

    def _png_name(self, index: int) -> str:
        return picture_name(index, self.class_names[self.labels[index]])

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
            "settings": self.recorded,
            "model": asdict(self.model.config),
            "extractor": self.extractor and {"name": self.extractor.name, "sha256": self.extractor.weights_hash},
            "reference": self.reference and {"path": str(self.reference.path), "sha256": self.reference.sha256},
            "order_file_sha256": self.order_file_sha256,
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
        spatial = self._statistics(files, "spatial", SPATIAL_DIM) if self.config.scoring.adm_suite else None

        def compute() -> dict[str, Any]:
            in_order = np.argsort(read_parts(files, "indices"))
            logits = torch.from_numpy(read_parts(files, "logits")[in_order])
            scores = score(statistics, logits, self.reference, extractor.name)
            names = self.classes or extractor.classes
            if names is not None and names == extractor.classes and len(names) == self.model.config.class_num:
                scores["class_accuracy"] = float((logits.argmax(1) == self.labels).double().mean())
            if spatial is not None and self.reference is not None:
                features = torch.from_numpy(read_parts(files, "features"))
                scores |= adm_scores(spatial, features, self.reference, extractor, self.config.eval_bsz)
            return scores | {"conventions": conventions(scores)}

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
        save_png(draw_grid(shown, self.grid_indices, self.labels.numpy(), self.classes), folder / "grid.png")
        pictures = [self.partial.picture(number) for number in range(config.num_images)] if self.partial.png_dir else []
        if missing := [path for path in pictures if not path.is_file()]:
            raise UserError(f"{missing[0]} has been removed; run the same command again.")
        labels = self.labels.numpy()
        if config.save_npz:
            write_adm_npz(folder / "samples.npz", pictures, labels, config.seed)
        if config.save_images:
            write_labels(self.png_dir, [path.name for path in pictures], labels, self.class_names)
            (self.partial.folder / MOVED).touch()
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
