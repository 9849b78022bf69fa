"""What a training reports while it runs: losses, speed, waiting, memory; and the check that the loss is finite."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.training.trackers import Tracker
from util.dist import Dist
from util.files import write_json
from util.logger import MetricsWriter
from util.pictures import save_png

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Dense bf16 FLOP/s of the data sheets, by part of the device's name; the first that fits counts.
PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the data sheet of a GPU promises; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


class Monitor:
    """Collects losses on the device and reads them back when a line is due.

    Rank 0 writes `metrics.jsonl` and passes each line on to the trackers:
    step, epoch, loss, lr, grad_norm (means since the line before, but for lr), images_per_sec (all processes, without
    evaluations), sec_per_step, data_wait_share (of the time, spent waiting for the loader), and on a GPU
    peak_memory_gib (of the run so far) and bf16_peak_share (of the data sheet's FLOP/s; left out for unknown GPUs).
    What is measured for a line besides stands in it too: val_loss, and with a moving average val_loss_ema.

    Args:
        flops_per_image: to train on one image (:func:`models.flops.training_flops`).
        samples_of: the samples of this process in a step, for the report about a loss that is not finite.
    """

    def __init__(
        self,
        folder: Path,
        dist: Dist,
        *,
        start_step: int,
        total_steps: int,
        steps_per_epoch: int,
        global_batch: int,
        flops_per_image: float,
        samples_of: Callable[[int], list[int]],
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._folder, self._dist, self._trackers = folder, dist, trackers
        self._steps_per_epoch, self._global_batch = steps_per_epoch, global_batch
        self._samples_of = samples_of
        peak = peak_flops(dist.device)
        self._max_images_per_sec = peak and peak * dist.world_size / flops_per_image
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._step = start_step
        self._start_clock()
        self._metrics = MetricsWriter(folder / "metrics.jsonl" if dist.is_main else None, start_step)
        self._redirect = logging_redirect_tqdm()  # messages get lines of their own
        self._bar = tqdm(
            initial=start_step,
            total=total_steps,
            desc="train",
            unit="step",
            disable=not dist.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file is not a screen
        )

    def _start_clock(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time spent waiting for them is measured."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Count one more step; nothing is read back."""
        self._losses.append(loss.double())
        self._norms.append(norm.double())
        self._bar.update()

    def report(self, lr: float, measure: Callable[[], dict[str, float]] | None = None) -> None:
        """Write a line about the steps since the last one; called by all processes after the same step.

        Args:
            measure: gives more figures for the line; its time doesn't count.

        Raises:
            FloatingPointError: on all processes, if a loss or a gradient was not finite.
        """
        steps = len(self._losses)
        losses, norms = torch.stack(self._losses), torch.stack(self._norms)
        mean_loss = self._dist.sum_(losses.mean()).item() / self._dist.world_size
        grad_norm = norms.mean().item()
        if not math.isfinite(mean_loss + grad_norm):
            self._fail(losses, norms)
        seconds = time.perf_counter() - self._start
        self._step += steps
        images_per_sec = steps * self._global_batch / seconds
        values = {"step": self._step, "epoch": round(self._step / self._steps_per_epoch, 4), "loss": mean_loss}
        values |= {"lr": lr, "grad_norm": grad_norm, "images_per_sec": round(images_per_sec, 2)}
        values |= {"sec_per_step": round(seconds / steps, 5), "data_wait_share": round(self._waited / seconds, 4)}
        shown = {"loss": f"{mean_loss:.4f}", "img/s": f"{images_per_sec:.0f}"}
        if self._max_images_per_sec is not None:
            values["bf16_peak_share"] = round(images_per_sec / self._max_images_per_sec, 4)
            shown["peak"] = f"{values['bf16_peak_share']:.0%}"
        if self._dist.device.type == "cuda":
            values["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self._dist.device) / 2**30, 2)
        if measure is not None:
            measured = measure()
            values |= measured
            shown |= {name: f"{value:.4f}" for name, value in measured.items()}
        self._bar.set_postfix(shown, refresh=False)
        if self._dist.is_main:
            self._write(values)
        self._losses, self._norms = [], []
        self._start_clock()

    def _write(self, values: dict[str, float]) -> None:
        try:
            self._metrics.write(**values)
            for tracker in self._trackers:
                tracker.scalars({k: v for k, v in values.items() if k != "step"}, self._step)
        except OSError as error:  # a full disk is no reason to stop
            logger.error("the figures of step %d could not be written: %s", self._step, error)

    def _fail(self, losses: torch.Tensor, norms: torch.Tensor) -> None:
        good = torch.isfinite(losses + norms)
        mine = len(good) if good.all() else int(good.int().argmin())
        first = min(self._dist.gather(mine))
        step = self._step + first + 1
        figures = {"loss": losses[first].item(), "grad_norm": norms[first].item()}
        report = {"step": step, "samples": self._samples_of(step - 1)}
        report |= {name: value if math.isfinite(value) else str(value) for name, value in figures.items()}
        write_json(self._folder / f"nonfinite-rank{self._dist.rank}.json", report)
        raise FloatingPointError(
            f"the loss or its gradient is not finite in step {step}; nothing was saved since, nonfinite-rank*.json in "
            f"{self._folder} name the samples of each process."
        )

    def picture(self, name: str, image: Image.Image, epoch: int) -> None:
        """Keep a picture as `<name>/epoch<epoch>.png`, and show it in the trackers."""
        try:
            save_png(image, self._folder / name / f"epoch{epoch:04}.png")
            for tracker in self._trackers:
                tracker.picture(name, image, epoch * self._steps_per_epoch)
        except OSError as error:
            logger.error("the picture of epoch %d could not be written: %s", epoch, error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the figures the time that something else than training takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def __enter__(self) -> Monitor:
        self._redirect.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()
        self._redirect.__exit__(kind, error, tb)
        self._metrics.close()
