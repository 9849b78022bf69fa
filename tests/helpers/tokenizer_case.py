"""A tokenizer that trains in a second: pictures of squares, a tiny size, and settings that use every loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.tokenizer_training.config import TokenizerTrainConfig
from engine.tokenizer_training.trainer import train_tokenizer
from tokenizers import VQConfig, load_tokenizer

CPU = torch.device("cpu")
MODEL = VQConfig(base_width=8, multipliers=(1, 2), res_blocks=1, z_channels=16, codebook_size=32, code_dim=4)
# Of pictures large enough for the discriminator.
LARGE = dataclasses.replace(MODEL, base_width=4, multipliers=(1, 1, 2), z_channels=8)
FULL = TokenizerTrainConfig(
    14, batch_size=3, lr=4e-3, eval_freq=4, held_out=0.1, flip=True, ema=0.9, adversarial_weight=0.5,
    adversarial_start=0.5, disc_width=4,
)  # fmt: skip


class Blobs:
    """48 pictures: a square on a background, both black, grey or white."""

    def __init__(self, side: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.zeros(48, side, side, 3, dtype=torch.uint8)
        for image in self.images:
            background, square = torch.randperm(3, generator=generator).tolist()[:2]
            row, column = torch.randint(0, side // 2 + 1, (2,), generator=generator).tolist()
            image[:] = 127 * background
            image[row : row + side // 2, column : column + side // 2] = 127 * square

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], 0


def train_full(folder: Path, config: TokenizerTrainConfig = FULL, **options: Any) -> dict[str, Any]:
    return train_tokenizer(Blobs(24), LARGE, config, folder, CPU, **options)


def outcome(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Weights, measurements and figures in a folder, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = load_tokenizer(folder / "tokenizer.pt").state_dict()
    return weights, [{**line, "elapsed_sec": 0} for line in lines], {**metrics, "train_sec": 0}


def assert_same(a: Path, b: Path) -> None:
    """Two trainings left the same, bit for bit."""
    (weights, *figures), (others, *expected) = outcome(a), outcome(b)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert figures == expected
