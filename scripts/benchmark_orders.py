"""How long orders take: the rules in plain Python, ours on the CPU and on a GPU if there is one; and their files.

    python -m scripts.benchmark_orders --output RESULTS.json

Prints a table and, as the last line, everything as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orders import generate_orders, group_sizes, load_orders, save_orders
from tests.helpers.orders_oracle import slow_order
from util.cli import Parser, exit_on_user_error
from util.errors import UserError
from util.files import write_json

SIZES = {256: (20, 2), 512: (48, 4)}  # image size: steps, repulsion threshold
REPEATS = 3  # runs of each, of which the median counts
CORES = len(os.sched_getaffinity(0))


def measure(row: dict[str, Any], run: Callable[[], object]) -> dict[str, Any]:
    """``row`` with the median, least and largest seconds of its runs, and their CPU seconds; prints it."""
    seconds, cpu_seconds = [], []
    for _ in range(REPEATS):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    row |= {"median_sec": statistics.median(seconds), "min_sec": min(seconds), "max_sec": max(seconds)}
    row["cpu_sec"] = statistics.median(cpu_seconds)  # of all threads; less than threads × seconds if others compute too
    row["orders_per_sec"] = row["orders"] / row["median_sec"]
    shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
    print(", ".join(shown), flush=True)
    return row


def draw_slowly(sizes: tuple[int, ...], side: int, rho: int, num: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(num):
        first = int(rng.integers(side * side))
        slow_order(sizes, (side, side), 1.0, rho, first, lambda _: rng.random(side * side).tolist())


def benchmark_drawing(img_size: int, steps: int, rho: int, num: int) -> list[dict[str, Any]]:
    """A row per implementation; those that are slower draw fewer orders."""
    side, sizes = img_size // 16, group_sizes(img_size, steps)

    def fast(count: int, **where: Any) -> None:
        generate_orders("lpd", count, sizes, side, 1.0, rho, **where)

    implementations: list[tuple[str, int, Callable[[int], None]]] = [
        ("plain Python, one order after the other", 10, partial(draw_slowly, sizes, side, rho)),
        ("NumPy, 1 thread", max(1, num // 10), partial(fast, workers=1)),
    ]
    if CORES > 1:
        implementations.append((f"NumPy, {CORES} threads", num, partial(fast, workers=CORES)))
    if torch.cuda.is_available():
        fast(num, device="cuda")  # starts CUDA and its memory pool
        implementations.append((f"torch, {torch.cuda.get_device_name()}", num, partial(fast, device="cuda")))
    return [
        measure({"img_size": img_size, "steps": steps, "implementation": name, "orders": count}, partial(run, count))
        for name, count, run in implementations
    ]


def benchmark_files(num: int) -> list[dict[str, Any]]:
    """Rows for writing, and for loading with all checks, 32×32 orders in both forms."""
    rows = []
    orders = generate_orders("random", num, group_sizes(512, 48), 32)
    with tempfile.TemporaryDirectory() as folder:
        for form in ("json", "safetensors"):
            path = Path(folder) / f"orders.{form}"
            save_orders(path, orders)
            row = {"form": form, "tokens": 1024, "orders": num, "megabytes": path.stat().st_size / 1e6}
            rows.append(measure({"operation": "write"} | row, partial(save_orders, path, orders)))
            rows.append(measure({"operation": "load"} | row, partial(load_orders, path, 32)))
    return rows


def main() -> None:
    parser = Parser(description="How long orders and their files take.")
    parser.add_argument("--num", type=int, default=60_000, help="orders per run")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if args.num < 1:
        raise UserError(f"--num {args.num} must be at least 1.")
    result = {
        "cores": CORES,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
        "drawing": [
            row for img_size, (steps, rho) in SIZES.items() for row in benchmark_drawing(img_size, steps, rho, args.num)
        ],
        "files": benchmark_files(args.num),
        "load_after": os.getloadavg()[0],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if args.output is not None:
        write_json(args.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    exit_on_user_error(main)
