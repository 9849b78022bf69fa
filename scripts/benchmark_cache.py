"""How fast a code cache is opened and read in random order, by one process: a synthetic one of ImageNet's size.

    python -m scripts.benchmark_cache [--num_images 1281167] [--num_tokens 256] [--output RESULTS.json]

The files are sparse, so that the cache takes no room on the disk; they are read through the page cache, as after the
first epoch of a training run on a machine with enough memory. Prints a table and, as the last line, everything as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, setting
from util.data.codes import CODES, CODES_FLIP, HEADER, LABELS, CacheHeader, open_codes
from util.data.loading import load_batches
from util.data.sampler import GlobalBatchSampler
from util.files import write_json

VOCAB = 16_384
BATCH_SIZE, BATCHES, REPEATS = 256, 400, 5


@dataclass(frozen=True)
class CacheBenchmark:
    """What is measured."""

    num_images: int = setting(1_281_167, "images in the cache; ImageNet's", at_least=BATCH_SIZE)
    num_tokens: int = setting(256, "codes per image, a square number", at_least=1)
    output: Path | None = setting(None, "write the results to this JSON file as well")

    def __post_init__(self) -> None:
        check(self)


def write_synthetic(cache: Path, num_images: int, num_tokens: int) -> None:
    """A cache whose codes are all 0, in sparse files."""
    for name in (CODES, CODES_FLIP):
        shape = (num_images, num_tokens)
        with open(cache / name, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + 2 * num_images * num_tokens)
    np.save(cache / LABELS, np.arange(num_images, dtype=np.int64) % 1000)
    side = math.isqrt(num_tokens)
    header = CacheHeader(
        img_size=16 * side, grid_size=side, num_images=num_images, classes=[str(i) for i in range(1000)],
        tokenizer_sha256="", vocab_size=VOCAB, max_code=0, crop="adm_center", source="synthetic", source_sha256="",
        skipped=[], files={},
    )  # fmt: skip
    write_json(cache / HEADER, dataclasses.asdict(header))


def measure_opening(cache: Path) -> dict[str, float]:
    """Seconds from the path to the first sample."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        open_codes(cache)[0]
        seconds.append(time.perf_counter() - start)
    return {"open_sec_median": statistics.median(seconds), "open_sec_max": max(seconds)}


def measure_reading(cache: Path) -> dict[str, float]:
    """Samples per second as training reads them: shuffled batches, in this process."""
    dataset = open_codes(cache)
    rates = []
    for repeat in range(REPEATS + 1):
        sampler = GlobalBatchSampler(len(dataset), BATCH_SIZE, 0, 1, seed=repeat, num_steps=BATCHES)
        batches = load_batches(dataset, sampler, 0, torch.device("cpu"))
        next(batches)  # draws the epoch's permutation
        start = time.perf_counter()
        samples = sum(len(labels) for _, _, labels in batches)
        rates.append(samples / (time.perf_counter() - start))
    warm = rates[1:]
    return {
        "samples_per_sec_median": statistics.median(warm),
        "samples_per_sec_min": min(warm),
        "samples_per_sec_max": max(warm),
    }


def main() -> None:
    parser = Parser(description="How fast a code cache is opened and read in random order.")
    parser.add_config(CacheBenchmark)
    config = from_args(CacheBenchmark, parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        write_synthetic(cache, config.num_images, config.num_tokens)
        results: dict[str, Any] = {
            "benchmark": "cache",
            "num_images": config.num_images,
            "num_tokens": config.num_tokens,
            "batch_size": BATCH_SIZE,
            "gigabytes": round(sum(path.stat().st_size for path in cache.iterdir()) / 1e9, 3),
            **measure_opening(cache),
            **measure_reading(cache),
            "machine": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
    for name, value in results.items():
        print(f"{name:24} {value:,.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if config.output:
        write_json(config.output, results)
    print(json.dumps(results))


if __name__ == "__main__":
    exit_on_user_error(main)
