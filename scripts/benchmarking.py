"""What the benchmarks share: a clock, the limits of a device, a code cache to read, figures with their conditions."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from engine.evaluation.outputs import describe_environment
from models.inference import CPU_PACKINGS, can_pack
from util.cli import Parser, from_args
from util.config import MAX_WORKERS, check, record, setting
from util.data.codes import CODES, CODES_FLIP, HEADER, LABELS, CacheHeader
from util.dist import DeviceConfig, Dist, resolve_device
from util.files import check_output_file, write_json

C = TypeVar("C", bound="BenchmarkConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(DeviceConfig):
    """Where a benchmark runs and writes; the base of what it measures."""

    threads: int | None = setting(None, "of the CPU (default: torch's)", at_least=1, at_most=MAX_WORKERS)
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        check(self)

    def with_defaults(self: C, **defaults: Any) -> C:
        """The same with these values in the place of None."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)


def read_config(cls: type[C], description: str | None) -> tuple[C, torch.device]:
    """What the command line asks for, and the device, ready to use."""
    parser = Parser(description=description)
    parser.add_config(cls)
    config = from_args(cls, parser.parse_args())
    if config.output is not None:
        check_output_file(config.output)
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return config, device


class Report:
    """Rows of figures and the conditions under which they were measured; printed and saved as they come."""

    def __init__(self, config: BenchmarkConfig, device: torch.device) -> None:
        self.output = config.output
        self.content: dict[str, Any] = {
            **record(config),
            "environment": describe_environment(Dist(0, 1, device)),
            "cpu_name": torch.cpu.get_capabilities().get("cpu_name"),
            "cpu_cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "load_before": os.getloadavg()[0],
        }

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Add a row to a table, print and save it."""
        rows = self.content.setdefault(table, [])
        if not rows:
            print(f"\n{table}:", " | ".join(row))
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else f"{value}" for value in row.values()))
        rows.append(row)
        self.save()

    def save(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.content |= {"load_after": os.getloadavg()[0], "peak_host_memory_gib": peak}
        if self.output is not None:
            write_json(self.output, self.content)

    def finish(self) -> None:
        """Save everything, and print it as the last line."""
        self.save()
        print(json.dumps(self.content), flush=True)


def time_runs(run: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of every run by the clock of the device, which is not waited for in between."""
    cuda = device.type == "cuda"

    def moment() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    moments = [moment()]
    for _ in range(count):
        run()
        moments.append(moment())
    if cuda:
        torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 if cuda else b - a for a, b in itertools.pairwise(moments)]


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the fastest of several.

    On a CPU of products with packed weights as well, which can be twice as fast; for torch.int8 of those alone.
    """
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    weights, products = str(dtype).removeprefix("torch."), []
    if device.type == "cpu" and can_pack(weights):
        products.append(partial(CPU_PACKINGS[weights].pack(right, None), left))
    if dtype.is_floating_point:
        products.append(partial(torch.matmul, left.to(dtype), right.to(dtype)))
    return 2 * side**3 / min(second for run in products for second in time_runs(run, 20, device)[5:])


def share(rate: float, limit: float) -> float | None:
    """Of what the device can do; None, not measured, above 1: the device was busy when the limit was measured."""
    return rate / limit if rate <= limit else None


def speed_up(seconds: float, plain_seconds: float | None) -> float | None:
    """How many times faster than the plain way in the same run; None where that was not run."""
    return None if plain_seconds is None else plain_seconds / seconds


def copy_bytes(device: torch.device) -> float:
    """Bytes read and written per second by a copy within the device's memory: the fastest of several."""
    source = torch.empty(2**31 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / min(time_runs(lambda: target.copy_(source), 10, device)[2:])


def forget_memory(device: torch.device) -> None:
    """Free what is no longer used; the peak counts from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """Of a GPU since :func:`forget_memory`; on a CPU of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_code_cache(cache: Path, num_images: int, num_tokens: int, vocab_size: int, random: bool) -> None:
    """A code cache of 1000 classes: random codes, or all 0 in sparse files, which take no room on the disk."""
    rng, side = np.random.default_rng(0), math.isqrt(num_tokens)
    for name in (CODES, CODES_FLIP):
        codes = np.lib.format.open_memmap(cache / name, "w+", np.uint16, (num_images, num_tokens))
        if random:
            codes[:] = rng.integers(vocab_size, size=codes.shape, dtype=np.uint16)
    np.save(cache / LABELS, np.arange(num_images, dtype=np.int64) % 1000)
    header = CacheHeader(
        img_size=16 * side, grid_size=side, num_images=num_images, classes=[str(i) for i in range(1000)],
        tokenizer_sha256="", vocab_size=vocab_size, max_code=vocab_size - 1, crop="adm_center", source="synthetic",
        source_sha256="", skipped=[], files={},
    )  # fmt: skip
    header.write(cache / HEADER)
