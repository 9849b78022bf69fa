"""Wall-clock time of generation by the published protocol: warm-up runs, then measured ones, device synchronised."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from engine.decoding.decoder import Decoder

# The paper's protocol (section 4.1): latency at batch 1, throughput at this batch size.
PUBLISHED_WARMUP, PUBLISHED_RUNS, PUBLISHED_BATCH_SIZE = 100, 500, 64


@dataclass(frozen=True)
class Latency:
    """Seconds of a batch of `batch_size` images, from labels on the host to results on the device.

    Attributes:
        host_s: median until the call returned, while a GPU goes on with it; None on a CPU, where the call is the work.
    """

    batch_size: int
    runs: int
    median_s: float
    p10_s: float
    p90_s: float
    host_s: float | None

    @property
    def images_per_sec(self) -> float:
        return self.batch_size / self.median_s


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_latency(decoder: Decoder, warmup: int, runs: int, progress: str | None = None) -> Latency:
    """Time a decoder on random orders and classes, fresh ones at every run.

    Args:
        progress: name of a progress bar; None shows none.
    """
    device, B, config = decoder.device, decoder.batch_size, decoder.model.config
    generator = torch.Generator().manual_seed(0)
    seconds, host_seconds = [], []
    for run in tqdm(range(warmup + runs), desc=progress, unit="run", disable=progress is None):
        orders = torch.rand(B, config.num_tokens, generator=generator).argsort(dim=1)
        seeds = torch.randint(2**62, (B,), generator=generator)
        labels = None
        if decoder.labels is not None:
            labels = torch.randint(config.class_num, (B,), generator=generator)
        synchronize(device)
        start = time.perf_counter()
        decoder(labels, orders, seeds)
        returned = time.perf_counter()
        synchronize(device)
        if run >= warmup:
            seconds.append(time.perf_counter() - start)
            host_seconds.append(returned - start)
    p10, median, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
    host = float(np.median(host_seconds)) if device.type == "cuda" else None
    return Latency(B, runs, median, p10, p90, host)
