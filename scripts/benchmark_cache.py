"""How fast a code cache is opened and read in random order, by one process: a synthetic one of ImageNet's size.

    python -m scripts.benchmark_cache [--num_images 1281167] [--num_tokens 256] [--output RESULTS.json]

The files are sparse, so that the cache takes no room on the disk; they are read through the page cache, as after the
first epoch of a training run on a machine with enough memory. Prints everything as JSON in the last line.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.benchmarking import BenchmarkConfig, Report, read_config, time_runs, write_code_cache
from util.cli import exit_on_user_error
from util.config import MAX_COUNT, setting
from util.data.codes import open_codes
from util.data.loading import load_batches
from util.data.sampler import GlobalBatchSampler

BATCH_SIZE, BATCHES, REPEATS = 256, 400, 5


@dataclass(frozen=True, kw_only=True)
class CacheBenchmark(BenchmarkConfig):
    """What is measured."""

    num_images: int = setting(1_281_167, "images in the cache; ImageNet's", at_least=BATCH_SIZE)
    num_tokens: int = setting(256, "codes per image, a square number", at_least=1, at_most=MAX_COUNT)


def reading_rates(cache: Path, device: torch.device) -> list[float]:
    """Samples per second of several epochs, read as training does: shuffled batches, in this process."""
    dataset, rates = open_codes(cache), []
    for repeat in range(REPEATS + 1):
        sampler = GlobalBatchSampler(len(dataset), BATCH_SIZE, 0, 1, seed=repeat, num_steps=BATCHES)
        batches = load_batches(dataset, sampler, 0, device)
        next(batches)  # draws the epoch's permutation
        start = time.perf_counter()
        samples = sum(len(labels) for _, _, labels in batches)
        rates.append(samples / (time.perf_counter() - start))
    return rates[1:]


def main() -> None:
    config, device = read_config(CacheBenchmark, __doc__)
    report = Report(config, device)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        write_code_cache(cache, config.num_images, config.num_tokens, vocab_size=16_384, random=False)
        gigabytes = sum(path.stat().st_size for path in cache.iterdir()) / 1e9
        seconds = time_runs(lambda: open_codes(cache)[0], REPEATS, torch.device("cpu"))  # from path to first sample
        rates = reading_rates(cache, device)
    report.content |= {
        "benchmark": "cache",
        "batch_size": BATCH_SIZE,
        "gigabytes": gigabytes,
        "open_sec_median": statistics.median(seconds),
        "open_sec_max": max(seconds),
        "samples_per_sec_median": statistics.median(rates),
        "samples_per_sec_min": min(rates),
        "samples_per_sec_max": max(rates),
    }
    report.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
