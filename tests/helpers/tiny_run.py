"""A training of seconds as a user would start it: a cache of random codes and the flags of main_lpd.py for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from util.checkpoint import LAST, load_checkpoint
from util.data.codes import CacheHeader, write_codes

L, V, CLASSES, N = 16, 11, 3, 64


def make_cache(
    folder: Path, num_images: int = N, *, grid_size: int = 4, vocab_size: int = V, tokenizer_sha256: str = "0" * 64
) -> Path:
    """A code cache of random codes, of images of 16 pixels per code."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(vocab_size, size=(num_images, grid_size**2), dtype=np.uint16) for _ in range(2)]
    header = CacheHeader(
        img_size=16 * grid_size, grid_size=grid_size, classes=["a", "b", "c"], tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size, source="test",
    )  # fmt: skip
    write_codes(folder, codes[0], codes[1], rng.integers(CLASSES, size=num_images), header)
    return folder


def flags(cache: Path, output: Path, epochs: int, batch_size: int = 4) -> list[str]:
    """For main_lpd.py: N / (batch_size · processes) steps per epoch."""
    values = {
        "model": "lpd_debug", "device": "cpu", "cached_path": cache, "output_dir": output, "epochs": epochs,
        "batch_size": batch_size, "lr": 1e-3, "lr_schedule": "cosine", "warmup_epochs": 1, "num_workers": 0,
        "save_last_freq": 10_000,
    }  # fmt: skip
    return ["--use_cached", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def steps_done(output: Path) -> int:
    """Steps of the last checkpoint; 0 without one."""
    path = (output / LAST).with_suffix(".json")
    return json.loads(path.read_text())["step"] if path.exists() else 0


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(output / LAST)["model"]
