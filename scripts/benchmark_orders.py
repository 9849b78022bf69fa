"""How long orders take: the rules in plain Python, ours on the CPU and on a GPU if there is one; and their files.

    python -m scripts.benchmark_orders --output RESULTS.json

Prints a row of each measurement and, as the last line, everything as JSON.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orders import generate_orders, group_sizes, load_orders, save_orders
from scripts.benchmarking import BenchmarkConfig, Report, read_config
from tests.helpers.orders_oracle import slow_order
from util.cli import exit_on_user_error
from util.config import setting

SIZES = {256: (20, 2), 512: (48, 4)}  # image size: steps, repulsion threshold
REPEATS = 3  # runs of each, of which the median counts


@dataclass(frozen=True, kw_only=True)
class OrdersBenchmark(BenchmarkConfig):
    """What is measured."""

    num: int = setting(60_000, "orders per run", at_least=1)


def measure(run: Callable[[], object], orders: int) -> dict[str, Any]:
    """Seconds of several runs, and CPU seconds: fewer than threads × seconds if others compute too."""

    def timed() -> tuple[float, float]:
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - start, time.process_time() - cpu_start

    seconds, cpu_seconds = zip(*(timed() for _ in range(REPEATS)), strict=True)
    median = statistics.median(seconds)
    spread = {"min_sec": min(seconds), "max_sec": max(seconds), "cpu_sec": statistics.median(cpu_seconds)}
    return {"orders": orders, "median_sec": median, **spread, "orders_per_sec": orders / median}


def draw_slowly(sizes: tuple[int, ...], side: int, rho: int, num: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(num):
        first = int(rng.integers(side * side))
        slow_order(sizes, (side, side), 1.0, rho, first, lambda _: rng.random(side * side).tolist())


def benchmark_drawing(report: Report, device: torch.device, img_size: int, steps: int, rho: int, num: int) -> None:
    """A row per implementation; those that are slower draw fewer orders."""
    side, sizes, threads = img_size // 16, group_sizes(img_size, steps), torch.get_num_threads()

    def fast(count: int, **where: Any) -> None:
        generate_orders("lpd", count, sizes, side, 1.0, rho, **where)

    implementations: list[tuple[str, int, Callable[[int], None]]] = [
        ("plain Python, one order after the other", 10, partial(draw_slowly, sizes, side, rho)),
        ("NumPy, 1 thread", max(1, num // 10), partial(fast, workers=1)),
    ]
    if threads > 1:
        implementations.append((f"NumPy, {threads} threads", num, partial(fast, workers=threads)))
    if device.type == "cuda":
        fast(num, device="cuda")  # starts CUDA and its memory pool
        implementations.append((f"torch, {torch.cuda.get_device_name()}", num, partial(fast, device="cuda")))
    for name, count, run in implementations:
        row = {"img_size": img_size, "steps": steps, "implementation": name}
        report.add("drawing", row | measure(partial(run, count), count))


def benchmark_files(report: Report, num: int) -> None:
    """Rows for writing, and for loading with all checks, 32×32 orders in both forms."""
    orders = generate_orders("random", num, group_sizes(512, 48), 32)
    with tempfile.TemporaryDirectory() as folder:
        for form in ("json", "safetensors"):
            path = Path(folder) / f"orders.{form}"
            for operation, run in (
                ("write", partial(save_orders, path, orders)),
                ("load", partial(load_orders, path, 32)),
            ):
                figures = measure(run, num)
                row = {"operation": operation, "form": form, "tokens": 1024, "megabytes": path.stat().st_size / 1e6}
                report.add("files", row | figures)


def main() -> None:
    config, device = read_config(OrdersBenchmark, __doc__)
    report = Report(config, device)
    for img_size, (steps, rho) in SIZES.items():
        benchmark_drawing(report, device, img_size, steps, rho, config.num)
    benchmark_files(report, config.num)
    report.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
