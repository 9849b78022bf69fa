"""Likelihoods of many images under many schedules, streamed over any number of processes; resumed after a kill.

An image's orders follow from its number (and the seed) alone, so neither the batch size nor the number of processes
changes a figure, and each image is counted once. Until a measurement is finished, a folder ``partial-*`` holds its
state, from which the same call goes on: sums, and one number per image and schedule.

Shape legend: `B` images, `K` orders of an image, `L` tokens, `N` images in all, `P` schedules, `S` steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from engine.evaluation.partial_results import PART, PartialResults, weights_summary
from engine.likelihood.passes import Decoding, Sums, token_bits
from engine.likelihood.source import Source
from engine.training.step import choose_attention
from util.dist import Dist
from util.errors import UserError, reading
from util.readers import load_arrays

logger = logging.getLogger(__name__)

ARRAYS = ("indices", "image_bits", "steps", "positions")  # of a part


@dataclass(frozen=True)
class Settings:
    """What the figures depend on beside source and schedules, and how they are computed."""

    orders_per_image: int = 1  # for orders that vary
    bf16: bool = False
    batch_size: int = 64


class Meter:
    """Computes the likelihood of images of a source; order k of image i is number i·K + k of K orders per image."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self.source, self.settings = source, settings
        self.device = source.images.device
        self.attention = choose_attention("auto", source.model.config, self.device)

    def orders_of(self, decoding: Decoding, images: NDArray[np.int64]) -> NDArray[np.integer]:
        """The orders of these images, (K, B, L)."""
        K = self.settings.orders_per_image if decoding.varies else 1
        numbers = images * K + np.arange(K)[:, None]
        return decoding.orders.of_images(numbers.ravel()).reshape(K, len(images), -1)

    def __call__(
        self,
        decoding: Decoding,
        tokens_BL: torch.Tensor,
        labels_B: torch.Tensor,
        orders_KBL: NDArray[np.integer],
    ) -> Sums:
        """The sums over these images, in one pass for each of their orders."""
        orders = torch.from_numpy(orders_KBL.astype(np.int64)).to(self.device)
        labels = labels_B if decoding.with_class else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            bits = torch.stack(
                [
                    token_bits(self.source.model, tokens_BL, labels, orders_BL, decoding.group_sizes, self.attention)
                    for orders_BL in orders
                ]
            )
        return Sums.of(bits, orders, decoding.group_sizes)


@dataclass
class Measured:
    """The results of :func:`measure`, the same on every process."""

    image_bits: NDArray[np.float64]  # (N, P)
    steps: list[NDArray[np.float64]]  # per schedule (2, S): see Sums
    positions: NDArray[np.float64]  # (P, L)
    passes: int  # of images, through the model, in this call


def measure(
    source: Source, decodings: Sequence[Decoding], settings: Settings, output_dir: Path, dist: Dist
) -> Measured:
    """Likelihoods of all images of a source under each of these schedules, with a progress bar.

    All processes call it together, with ``output_dir`` on a file system that they share.
    """
    folder = output_dir / f"partial-{dist.broadcast(_fingerprint(source, decodings, settings))}"
    partial = PartialResults(folder, names=ARRAYS, per_image=("image_bits",))
    done, count = dist.on_main(partial.repair), len(source.images)
    if len(done):
        logger.info("%d of %d images are there already; measuring the rest", len(done), count)
    missing, size = np.setdiff1d(np.arange(count), done), settings.batch_size
    batches = [missing[start : start + size] for start in range(0, len(missing), size)]
    meter, mine = Meter(source, settings), batches[dist.rank :: dist.world_size]
    bar = tqdm(
        total=sum(map(len, mine)) * len(decodings), desc="likelihood", unit="image", disable=not dist.is_main,
        unit_scale=True,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(1) as pool:
        unsaved: list[dict[str, NDArray]] = []
        for turn, made in enumerate(_measure_batches(meter, decodings, mine, pool, bar)):
            unsaved.append(made)
            if turn == len(mine) - 1 or partial.due():
                partial.add(_together(unsaved))
                partial.save()
                unsaved = []
    dist.barrier()
    files, done = dist.broadcast((partial.files(), partial.done()))
    if not np.array_equal(done, np.arange(count)):
        raise UserError(
            f"{partial.folder} does not hold each of the {count} images once; all processes must share its file system "
            "and no second measurement may use it. Delete it to start again."
        )
    orders_each = [settings.orders_per_image if decoding.varies else 1 for decoding in decodings]
    measured = _read(files, decodings, count, len(missing) * sum(orders_each))
    dist.barrier()
    dist.on_main(lambda: shutil.rmtree(partial.folder, ignore_errors=True))
    return measured


def _fingerprint(source: Source, decodings: Sequence[Decoding], settings: Settings) -> str:
    """What the figures depend on: only a measurement with the same one is resumed."""
    depends_on = [
        source.images.fingerprint,
        weights_summary(source.model),
        [decoding.key for decoding in decodings],
        [settings.orders_per_image, settings.bf16],
    ]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]


def _measure_batches(
    meter: Meter,
    decodings: Sequence[Decoding],
    batches: Sequence[NDArray[np.int64]],
    pool: ThreadPoolExecutor,
    bar: tqdm,
) -> Iterator[dict[str, NDArray]]:
    """The arrays of each batch for :class:`PartialResults`; orders are drawn while the model is at those before."""
    work = [(images, decoding) for images in batches for decoding in decodings]

    def draw(number: int) -> Future[NDArray[np.integer]]:
        return pool.submit(meter.orders_of, work[number][1], work[number][0])

    drawn: Future[NDArray[np.integer]] | None = None
    sums: list[Sums] = []
    for number, (images, decoding) in enumerate(work):
        if not sums:
            tokens, labels = meter.source.images.codes(images)
        orders = draw(number) if drawn is None else drawn
        drawn = None
        if number + 1 < len(work):
            following, after = work[number + 1]
            same = following is images and after.order_key == decoding.order_key
            drawn = orders if same else draw(number + 1)
        sums.append(meter(decoding, tokens, labels, orders.result()))
        bar.update(len(images))
        if len(sums) == len(decodings):
            yield {
                "indices": images,
                "image_bits": np.stack([s.images for s in sums], axis=1),
                "steps": np.concatenate([s.steps for s in sums], axis=1)[None],
                "positions": np.stack([s.positions for s in sums])[None],
            }
            sums = []


def _together(batches: Sequence[dict[str, NDArray]]) -> dict[str, NDArray]:
    """The same arrays for all images of these batches: what is per image one after the other, the rest added up."""
    per_image = {name: np.concatenate([made[name] for made in batches]) for name in ("indices", "image_bits")}
    return per_image | {name: np.sum([made[name] for made in batches], axis=0) for name in ("steps", "positions")}


def _read(files: Sequence[Path], decodings: Sequence[Decoding], count: int, passes: int) -> Measured:
    """Everything that the part files hold, one after the other."""
    image_bits = np.empty((count, len(decodings)))
    totals = []
    for path in files:
        with reading(PART, path):
            arrays = load_arrays(PART, path, ARRAYS)
            image_bits[arrays["indices"]] = arrays["image_bits"]
            totals.append((arrays["steps"].sum(0), arrays["positions"].sum(0)))
    steps, positions = (sum(arrays) for arrays in zip(*totals, strict=True))
    ends = np.cumsum([len(decoding.group_sizes) for decoding in decodings])[:-1]
    return Measured(image_bits, np.split(steps, ends, axis=1), positions, passes)
