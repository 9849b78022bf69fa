"""How fast a model trains in one process: a plain loop against the training step, and that fed from a cache of codes.

    python -m scripts.benchmark_train --model lpd_l --batch_size 64 --output RESULTS.json
    python -m scripts.benchmark_train --model lpd_debug --img_size 64 --batch_size 4 --device cpu

Codes are random, schedules and orders those of training. Share of peak: FLOPs to train on an image, 3 × forward, with
attention counted by the pairs of rows that see each other (models/flops.py), times images/s, divided by the FLOP/s of a
large matrix product in the same dtype and run. Prints a table and, as the last line, everything as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine.evaluation.outputs import describe_environment
from engine.training.optim import build_adamw
from engine.training.step import ATTENTIONS, Part, TrainStep, choose_attention, draw_samples, mirrored_codes
from models import MODEL_SIZES, model_config
from models.flops import training_flops
from models.lpd import LPD, LPDConfig
from orders import published_group_sizes
from scripts.device_limits import Marks, matrix_product_flops
from util.cli import HelpFormatter, exit_on_user_error
from util.data.codes import CODES, CODES_FLIP, HEADER, LABELS, CacheHeader, open_codes
from util.data.loading import load_batches
from util.data.sampler import GlobalBatchSampler
from util.dist import Dist, resolve_device
from util.errors import UserError
from util.files import write_json

LR, CLIP, LABEL_DROP = 1e-4, 3.0, 0.1
# (parts of a step, group sizes, learning rate) → (loss, gradient norm), as TrainStep.
Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]


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

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.config = model_config(
            args.model, img_size=args.img_size, proj_dropout=0.1, grad_checkpointing=args.grad_checkpointing
        )
        self.schedules = published_group_sizes(self.config.img_size, self.config.stride)
        # Every schedule once, so that masks and kernels are made before the clock starts.
        self.warmup = max(args.warmup, len(self.schedules))
        self.flops_per_image = training_flops(self.config)
        self.peak = matrix_product_flops(device, torch.bfloat16 if args.bf16 else torch.float32)

    def resident_batches(self) -> Iterator[list[torch.Tensor]]:
        """The same random codes again and again, on the device already: no data to wait for."""
        size, config = (self.args.batch_size, self.config.num_tokens), self.config
        codes = [torch.randint(config.vocab_size, size, device=self.device) for _ in range(2)]
        labels = torch.randint(config.class_num, size[:1], device=self.device)
        while True:
            yield [*codes, labels]

    def cached_batches(self, cache: Path) -> Iterator[list[torch.Tensor]]:
        """Through the loader of training."""
        dataset = open_codes(cache, vocab_size=self.config.vocab_size)
        sampler = GlobalBatchSampler(len(dataset), self.args.batch_size, 0, 1, seed=0)
        return load_batches(dataset, sampler, 0, self.device)

    def parts(self, step: int, batch: list[torch.Tensor]) -> Iterator[Part]:
        *data, labels = batch
        rows = range(len(labels))
        orders, flip, label_drop = draw_samples(0, step, rows, self.config.num_tokens, 0.5, LABEL_DROP, self.device)
        yield mirrored_codes(data, flip, None), labels, orders, label_drop

    def measure(self, name: str, build: Callable[[LPD], Step], batches: Iterator[list[torch.Tensor]]) -> dict[str, Any]:
        """A row of the table, or why there is none; prints it."""
        torch.manual_seed(0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        row: dict[str, Any] = {"name": name}
        try:
            row |= self._steps(build(LPD(self.config).to(self.device)), batches)
        except torch.cuda.OutOfMemoryError:
            row["failed"] = "out of memory"
        gc.collect()
        if self.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.empty_cache()
        texts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        print(", ".join(texts), flush=True)
        return row

    def _steps(self, step: Step, batches: Iterator[list[torch.Tensor]]) -> dict[str, Any]:
        marks, waited, start = Marks(self.device), 0.0, time.perf_counter()
        for index in range(self.warmup + self.args.steps):
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
        images_per_sec = self.args.batch_size * self.args.steps / total
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODEL_SIZES, default="lpd_l", help="size")
    add("--img_size", type=int, default=256, help="pixels")
    add("--batch_size", type=int, default=64, help="images per step")
    add("--steps", type=int, default=50, help="measured steps")
    add("--warmup", type=int, default=10, help="steps before; at least one of every schedule")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on a GPU)")
    add("--grad_checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--attention", choices=ATTENTIONS, default="auto", help="of the fast rows")
    add("--compile", action=argparse.BooleanOptionalAction, help="of the fast rows (default: on a GPU)")
    add("--no_plain", action="store_true", help="leave out the plain loop")
    add("--cache_images", type=int, default=50_000, help="size of the random cache")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    for name in ("batch_size", "steps", "cache_images"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1.")
    if args.warmup < 0:
        raise UserError(f"--warmup {args.warmup} must not be negative.")
    device = resolve_device(args.device)
    args.bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    dist = Dist(0, 1, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    environment = describe_environment(dist)
    benchmark = Benchmark(args, device)
    attention = choose_attention(args.attention, benchmark.config, device)
    load_before = os.getloadavg()[0]

    def fast(model: LPD) -> TrainStep:
        return TrainStep(model, dist, grad_clip=CLIP, bf16=args.bf16, attention=attention, compiled=args.compile)

    rows = []
    if not args.no_plain:
        rows.append(benchmark.measure("plain", lambda model: PlainStep(model, args.bf16), benchmark.resident_batches()))
    rows.append(benchmark.measure("fast", fast, benchmark.resident_batches()))
    with tempfile.TemporaryDirectory() as folder:
        write_random_cache(Path(folder), benchmark.config, args.cache_images)
        rows.append(benchmark.measure("fast, from a cache", fast, benchmark.cached_batches(Path(folder))))
    result = {
        "benchmark": "train",
        "model": args.model,
        "img_size": args.img_size,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "dtype": "bfloat16 autocast" if args.bf16 else "float32",
        "attention": attention,
        "compile": args.compile,
        "grad_checkpointing": args.grad_checkpointing,
        "gflop_per_image": benchmark.flops_per_image / 1e9,
        "matrix_product_tflops": benchmark.peak / 1e12,
        "rows": rows,
        "environment": environment,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "peak_host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if args.output is not None:
        write_json(args.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    exit_on_user_error(main)
