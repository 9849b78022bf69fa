"""How fast a cache of codes is opened and read in random order, one worker: a synthetic one of ImageNet's size.

    python -m scripts.benchmark_cache [--num_images 1281167] [--num_tokens 256] [--output RESULTS.json]

The files are sparse, so that the cache takes no room on the disk; they are read through the page cache, as after the
first epoch of a training run on a machine with enough memory. Prints a table and, as the last line, everything as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from util.cli import exit_on_user_error
from util.data.codes import CODES, CODES_FLIP, HEADER, LABELS, CacheHeader, open_codes
from util.data.loading import whole_batch
from util.data.sampler import GlobalBatchSampler
from util.errors import UserError
from util.files import write_json

IMAGENET_IMAGES, VOCAB = 1_281_167, 16_384


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


def measure_opening(cache: Path, repeats: int) -> dict[str, float]:
    """Seconds from the path to the first sample."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        open_codes(cache)[0]
        seconds.append(time.perf_counter() - start)
    return {"open_sec_median": statistics.median(seconds), "open_sec_max": max(seconds)}


def measure_reading(cache: Path, batch_size: int, batches: int, repeats: int) -> dict[str, float]:
    """Samples per second as training reads them: shuffled batches through a DataLoader in this process."""
    dataset = open_codes(cache)
    rates = []
    for repeat in range(repeats + 1):
        sampler = GlobalBatchSampler(len(dataset), batch_size, 0, 1, seed=repeat, num_steps=batches)
        loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=sampler, collate_fn=whole_batch)
        iterator = iter(loader)
        next(iterator)  # draws the epoch's permutation
        start = time.perf_counter()
        samples = sum(len(labels) for _, _, labels in iterator)
        rates.append(samples / (time.perf_counter() - start))
    warm = rates[1:]
    return {
        "samples_per_sec_median": statistics.median(warm),
        "samples_per_sec_min": min(warm),
        "samples_per_sec_max": max(warm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=IMAGENET_IMAGES, help="(%(default)s, ImageNet's)")
    parser.add_argument("--num_tokens", type=int, default=256, help="codes per image, a square number (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--batches", type=int, default=400, help="read in each repetition (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file as well")
    args = parser.parse_args()
    for name in ("num_images", "num_tokens", "batch_size", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1.")
    if args.batches < 2:
        raise UserError(f"--batches {args.batches} must be at least 2; the first one is not timed.")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        write_synthetic(cache, args.num_images, args.num_tokens)
        results: dict[str, Any] = {
            "benchmark": "cache",
            "num_images": args.num_images,
            "num_tokens": args.num_tokens,
            "batch_size": args.batch_size,
            "gigabytes": round(sum(path.stat().st_size for path in cache.iterdir()) / 1e9, 3),
            **measure_opening(cache, args.repeats),
            **measure_reading(cache, args.batch_size, args.batches, args.repeats),
            "machine": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
    for name, value in results.items():
        print(f"{name:24} {value:,.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if args.output:
        write_json(args.output, results)
    print(json.dumps(results))


if __name__ == "__main__":
    exit_on_user_error(main)
