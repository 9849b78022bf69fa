"""How fast a model trains in one process: a plain loop, the training step, and that step fed from a code cache.

    python -m scripts.benchmark_train --model lpd_l --batch_size 64 --output RESULTS.json
    python -m scripts.benchmark_train --model lpd_debug --img_size 64 --batch_size 4 --device cpu

Codes are random; group sizes and orders are drawn as in training. Share of peak: FLOPs to train on an image, 3 ×
forward, with attention counted by the pairs of rows that see each other (models/flops.py), times images/s, divided by
the FLOP/s of a large matrix product in the same dtype and run; null above 1, as on a device that was busy when that was
measured. `speed_up` is the plain loop's median step over this one's, in the same run; null where the plain loop fails.
Prints a row of each measurement, and all of it as JSON in the last line.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from engine.training.batch import Part, codes_of, draw_samples
from engine.training.config import ATTENTIONS, TrainConfig
from engine.training.optim import build_adamw
from engine.training.step import TrainStep, choose_attention
from models import MODEL_SIZES, model_config
from models.flops import training_flops
from models.lpd import LPD
from orders import published_group_sizes
from scripts.benchmarking import (
    BenchmarkConfig,
    Report,
    forget_memory,
    matrix_product_flops,
    peak_memory_gib,
    read_config,
    share,
    speed_up,
    time_runs,
    write_code_cache,
)
from util.cli import exit_on_user_error
from util.config import MAX_SIDE, setting
from util.data.codes import open_codes
from util.data.loading import load_batches
from util.data.sampler import GlobalBatchSampler
from util.dist import Dist

LR, CLIP, LABEL_DROP = 1e-4, 3.0, 0.1
# (parts of a step, group sizes, learning rate) → (loss, gradient norm), as TrainStep.
Step = Callable[[list[Part], tuple[int, ...], float], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark(BenchmarkConfig):
    """What to measure; what is None by default follows the device."""

    model: str = setting("lpd_l", "size", choices=tuple(MODEL_SIZES))
    img_size: int = setting(256, "pixels", at_least=1, at_most=MAX_SIDE)
    batch_size: int = setting(64, "images per step", at_least=1)
    steps: int = setting(50, "measured steps", at_least=1)
    warmup: int = setting(10, "steps before; at least one of every schedule", at_least=0)
    bf16: bool = setting(None, "bfloat16 autocast (default: on a GPU)")
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    attention: str = setting("auto", "of the fast rows", choices=ATTENTIONS)
    compile: bool = setting(None, "of the fast rows (default: on a GPU)")
    cache_images: int = setting(50_000, "size of the random cache", at_least=1)


class PlainStep:
    """The textbook loop: dense mask, all logits at once, nothing compiled."""

    def __init__(self, model: LPD, bf16: bool) -> None:
        self.model, self.bf16, self.optimizer = model, bf16, build_adamw(model, 0.02)

    def __call__(self, parts: list[Part], group_sizes: tuple[int, ...], lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens, labels, orders, label_drop = parts[0]
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(tokens, labels, orders, group_sizes, label_drop)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.gather(1, orders).flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm


class Benchmark:
    """One model, batch and device; each row measures another way to train it from the same first weights."""

    def __init__(self, config: TrainBenchmark, device: torch.device) -> None:
        self.lpd = model_config(
            config.model, img_size=config.img_size, proj_dropout=0.1, grad_checkpointing=config.grad_checkpointing
        )
        # UserError where the device lacks the attention asked for.
        attention = choose_attention(config.attention, self.lpd, device)
        cuda = device.type == "cuda"
        config = config.with_defaults(bf16=cuda, compile=cuda)
        self.config, self.device = config, device
        self.schedules = published_group_sizes(self.lpd.img_size, self.lpd.stride)
        self.flops_per_image = training_flops(self.lpd)
        self.report = Report(config, device)
        self.plain_sec: float | None = None  # median step of the plain loop
        self.peak = matrix_product_flops(device, torch.bfloat16 if config.bf16 else torch.float32)
        self.report.content |= {
            "benchmark": "train",
            "attention": attention,
            "dtype": "bfloat16 autocast" if config.bf16 else "float32",
            "gflop_per_image": self.flops_per_image / 1e9,
            "matrix_product_tflops": self.peak / 1e12,
        }

    def resident_batches(self) -> Iterator[list[torch.Tensor]]:
        """The same random codes again and again, on the device already: no data to wait for."""
        size, config = (self.config.batch_size, self.lpd.num_tokens), self.lpd
        codes = [torch.randint(config.vocab_size, size, device=self.device) for _ in range(2)]
        labels = torch.randint(config.class_num, size[:1], device=self.device)
        yield from itertools.repeat([*codes, labels])

    def cached_batches(self, cache: Path) -> Iterator[list[torch.Tensor]]:
        """Through the loader of training."""
        dataset = open_codes(cache)
        sampler = GlobalBatchSampler(len(dataset), self.config.batch_size, 0, 1, seed=0)
        return load_batches(dataset, sampler, 0, self.device)

    def measure(self, name: str, build: Callable[[LPD], Step], batches: Iterator[list[torch.Tensor]]) -> None:
        """Report how fast it trains, or why it does not."""
        torch.manual_seed(0)
        forget_memory(self.device)
        try:
            figures = self._train(build(LPD(self.lpd).to(self.device)), batches)
        except torch.cuda.OutOfMemoryError:
            figures = {"failed": "out of memory"}
        if name == "plain":
            self.plain_sec = figures.get("median_sec_per_step")
        if "failed" not in figures:
            figures["speed_up"] = speed_up(figures["median_sec_per_step"], self.plain_sec)
        self.report.add("rows", {"name": name, **figures, "peak_memory_gib": peak_memory_gib(self.device)})

    def _train(self, step: Step, batches: Iterator[list[torch.Tensor]]) -> dict[str, Any]:
        # Every schedule once, so that masks and kernels are made before the clock starts.
        warmup = max(self.config.warmup, len(self.schedules))
        waits: list[float] = []
        losses: list[torch.Tensor] = []

        def run() -> None:
            start, index = time.perf_counter(), len(waits)
            *codes, labels = next(batches)
            waits.append(time.perf_counter() - start)
            rows, tokens = range(len(labels)), self.lpd.num_tokens
            orders, flip, label_drop = draw_samples(0, index, rows, tokens, 0.5, LABEL_DROP, self.device)
            part = codes_of(codes, flip, None), labels, orders, label_drop
            losses.append(step([part], self.schedules[index % len(self.schedules)], LR)[0])

        seconds = time_runs(run, warmup + self.config.steps, self.device)
        measured = seconds[warmup:]
        images_per_sec = self.config.batch_size * len(measured) / sum(measured)
        return {
            "images_per_sec": images_per_sec,
            "peak_share": share(images_per_sec * self.flops_per_image, self.peak),
            "median_sec_per_step": statistics.median(measured),
            "min_sec_per_step": min(measured),
            "max_sec_per_step": max(measured),
            # Of the host's time; on a GPU it may be hidden behind earlier work.
            "data_wait_share": sum(waits[warmup:]) / sum(measured),
            "warmup_sec": sum(seconds[:warmup]),  # compilation included
            "last_loss": losses[-1].item(),
        }


def main() -> None:
    config, device = read_config(TrainBenchmark, __doc__)
    benchmark = Benchmark(config, device)
    config = benchmark.config
    train = TrainConfig(grad_clip=CLIP, bf16=config.bf16, attention=config.attention, compile=config.compile)

    def fast(model: LPD) -> TrainStep:
        return TrainStep(model, train, Dist(0, 1, device))

    benchmark.measure("plain", lambda model: PlainStep(model, config.bf16), benchmark.resident_batches())
    benchmark.measure("fast", fast, benchmark.resident_batches())
    with tempfile.TemporaryDirectory() as folder:
        lpd = benchmark.lpd
        write_code_cache(Path(folder), config.cache_images, lpd.num_tokens, lpd.vocab_size, random=True)
        benchmark.measure("fast, from a cache", fast, benchmark.cached_batches(Path(folder)))
    benchmark.report.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
