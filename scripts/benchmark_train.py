"""How fast a model trains in one process: a plain loop, the training step, and that step fed from a code cache.

    python -m scripts.benchmark_train --model lpd_l --batch_size 64 --output RESULTS.json
    python -m scripts.benchmark_train --model lpd_debug --img_size 64 --batch_size 4 --device cpu

Codes are random; group sizes and orders are drawn as in training. Share of peak: FLOPs to train on an image, 3 ×
forward, with attention counted by the pairs of rows that see each other (models/flops.py), times images/s, divided by
the FLOP/s of a large matrix product in the same dtype and run. Prints a table, and all of it as JSON in the last line.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine.evaluation.outputs import describe_environment
from engine.training.config import ATTENTIONS, TrainConfig
from engine.training.optim import build_adamw
from engine.training.step import Part, TrainStep, choose_attention, draw_samples, mirrored_codes
from models import MODEL_SIZES, model_config
from models.flops import training_flops
from models.lpd import LPD, LPDConfig
from orders import published_group_sizes
from scripts.device_limits import Marks, matrix_product_flops
from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, record, setting
from util.data.codes import CODES, CODES_FLIP, HEADER, LABELS, CacheHeader, open_codes
from util.data.loading import load_batches
from util.data.sampler import GlobalBatchSampler
from util.dist import Dist, resolve_device
from util.files import write_json

LR, CLIP, LABEL_DROP = 1e-4, 3.0, 0.1
# (parts of a step, group sizes, learning rate) → (loss, gradient norm), as TrainStep.
Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure. bf16 and compile follow the device by default (:meth:`for_device`)."""

    model: str = setting("lpd_l", "size", choices=tuple(MODEL_SIZES))
    img_size: int = setting(256, "pixels")
    batch_size: int = setting(64, "images per step", at_least=1)
    steps: int = setting(50, "measured steps", at_least=1)
    warmup: int = setting(10, "steps before; at least one of every schedule", at_least=0)
    bf16: bool = setting(None, "bfloat16 autocast (default: on a GPU)")
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    attention: str = setting("auto", "of the fast rows", choices=ATTENTIONS)
    compile: bool = setting(None, "of the fast rows (default: on a GPU)")
    cache_images: int = setting(50_000, "size of the random cache", at_least=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        check(self)

    def for_device(self, device: torch.device) -> BenchmarkConfig:
        """Without None, and with the attention that the device has. UserError where it lacks the one asked for."""
        cuda = device.type == "cuda"
        return dataclasses.replace(
            self,
            bf16=cuda if self.bf16 is None else self.bf16,
            compile=cuda if self.compile is None else self.compile,
            attention=choose_attention(self.attention, self.lpd_config(), device),
        )

    def lpd_config(self) -> LPDConfig:
        return model_config(
            self.model, img_size=self.img_size, proj_dropout=0.1, grad_checkpointing=self.grad_checkpointing
        )


class PlainStep:
    """The textbook loop: dense mask, all logits at once, nothing compiled."""

    def __init__(self, model: LPD, bf16: bool) -> None:
        self.model, self.bf16, self.optimizer = model, bf16, build_adamw(model, 0.02)

    def __call__(
        self, parts: Iterator[Part], group_sizes: tuple[int, ...], lr: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens, labels, orders, label_drop = next(parts)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(tokens, labels, orders, group_sizes, label_drop)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.gather(1, orders).flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm


def write_random_cache(cache: Path, config: LPDConfig, num_images: int) -> None:
    """A code cache of random codes."""
    rng = np.random.default_rng(0)
    for name in (CODES, CODES_FLIP):
        np.save(cache / name, rng.integers(config.vocab_size, size=(num_images, config.num_tokens), dtype=np.uint16))
    np.save(cache / LABELS, rng.integers(config.class_num, size=num_images))
    header = CacheHeader(
        img_size=config.img_size, grid_size=config.grid_size, num_images=num_images,
        classes=[str(i) for i in range(config.class_num)], tokenizer_sha256="", vocab_size=config.vocab_size,
        max_code=config.vocab_size - 1, crop="adm_center", source="random", source_sha256="", skipped=[], files={},
    )  # fmt: skip
    write_json(cache / HEADER, dataclasses.asdict(header))


class Benchmark:
    """One model, batch and device; each row measures another way to train it from the same first weights."""

    def __init__(self, config: BenchmarkConfig, device: torch.device) -> None:
        self.config, self.device, self.lpd = config, device, config.lpd_config()
        self.environment, self.load_before = describe_environment(Dist(0, 1, device)), os.getloadavg()[0]
        self.schedules = published_group_sizes(self.lpd.img_size, self.lpd.stride)
        # Every schedule once, so that masks and kernels are made before the clock starts.
        self.warmup = max(config.warmup, len(self.schedules))
        self.flops_per_image = training_flops(self.lpd)
        self.peak = matrix_product_flops(device, torch.bfloat16 if config.bf16 else torch.float32)
        self.rows: list[dict[str, Any]] = []

    def resident_batches(self) -> Iterator[list[torch.Tensor]]:
        """The same random codes again and again, on the device already: no data to wait for."""
        size, config = (self.config.batch_size, self.lpd.num_tokens), self.lpd
        codes = [torch.randint(config.vocab_size, size, device=self.device) for _ in range(2)]
        labels = torch.randint(config.class_num, size[:1], device=self.device)
        while True:
            yield [*codes, labels]

    def cached_batches(self, cache: Path) -> Iterator[list[torch.Tensor]]:
        """Through the loader of training."""
        dataset = open_codes(cache)
        sampler = GlobalBatchSampler(len(dataset), self.config.batch_size, 0, 1, seed=0)
        return load_batches(dataset, sampler, 0, self.device)

    def parts(self, step: int, batch: list[torch.Tensor]) -> Iterator[Part]:
        *data, labels = batch
        rows = range(len(labels))
        orders, flip, label_drop = draw_samples(0, step, rows, self.lpd.num_tokens, 0.5, LABEL_DROP, self.device)
        yield mirrored_codes(data, flip, None), labels, orders, label_drop

    def measure(self, name: str, build: Callable[[LPD], Step], batches: Iterator[list[torch.Tensor]]) -> None:
        """Add a row to the table, or why there is none, and print it."""
        torch.manual_seed(0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        row: dict[str, Any] = {"name": name}
        try:
            row |= self._steps(build(LPD(self.lpd).to(self.device)), batches)
        except torch.cuda.OutOfMemoryError:
            row["failed"] = "out of memory"
        gc.collect()
        if self.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.empty_cache()
        texts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        print(", ".join(texts), flush=True)
        self.rows.append(row)

    def _steps(self, step: Step, batches: Iterator[list[torch.Tensor]]) -> dict[str, Any]:
        marks, waited, start = Marks(self.device), 0.0, time.perf_counter()
        for index in range(self.warmup + self.config.steps):
            if index == self.warmup:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                startup, waited, start = time.perf_counter() - start, 0.0, time.perf_counter()
                marks.mark()
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            group_sizes = self.schedules[index % len(self.schedules)]
            loss, _ = step(self.parts(index, batch), group_sizes, LR)
            if index >= self.warmup:
                marks.mark()
        seconds = marks.seconds()
        total = time.perf_counter() - start
        images_per_sec = self.config.batch_size * self.config.steps / total
        return {
            "images_per_sec": images_per_sec,
            "peak_share": images_per_sec * self.flops_per_image / self.peak,
            "median_sec_per_step": statistics.median(seconds),
            "min_sec_per_step": min(seconds),
            "max_sec_per_step": max(seconds),
            "data_wait_share": waited / total,  # of the host's time; on a GPU it may be hidden behind earlier work
            "warmup_sec": startup,  # compilation included
            "last_loss": loss.item(),
        }

    def measure_all(self) -> None:
        config, dist = self.config, Dist(0, 1, self.device)
        train = TrainConfig(grad_clip=CLIP, bf16=config.bf16, attention=config.attention, compile=config.compile)

        def fast(model: LPD) -> TrainStep:
            return TrainStep(model, train, dist)

        self.measure("plain", lambda model: PlainStep(model, config.bf16), self.resident_batches())
        self.measure("fast", fast, self.resident_batches())
        with tempfile.TemporaryDirectory() as folder:
            write_random_cache(Path(folder), self.lpd, config.cache_images)
            self.measure("fast, from a cache", fast, self.cached_batches(Path(folder)))

    def output(self) -> dict[str, Any]:
        return {
            "benchmark": "train",
            **record(self.config),
            "dtype": "bfloat16 autocast" if self.config.bf16 else "float32",
            "gflop_per_image": self.flops_per_image / 1e9,
            "matrix_product_tflops": self.peak / 1e12,
            "rows": self.rows,
            "environment": self.environment,
            "cpu_cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "load_before": self.load_before,
            "load_after": os.getloadavg()[0],
            "peak_host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def main() -> None:
    parser = Parser(prog="python -m scripts.benchmark_train", description=__doc__)
    parser.add_config(BenchmarkConfig)
    args = parser.parse_args()
    device = resolve_device(args.device)
    config = from_args(BenchmarkConfig, args).for_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    benchmark = Benchmark(config, device)
    benchmark.measure_all()
    result = benchmark.output()
    if config.output is not None:
        write_json(config.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    exit_on_user_error(main)
