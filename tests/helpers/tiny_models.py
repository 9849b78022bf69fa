"""Networks and images small enough for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.lpd import LPD
from tokenizers import VQConfig, VQModel


def tiny_tokenizer(stride: int = 4, codebook_size: int = 12) -> VQModel:
    """With random weights, in evaluation mode; `stride` is a power of two."""
    return VQModel(VQConfig(8, (1,) * stride.bit_length(), 1, 8, codebook_size, 4)).eval()


def far_from_initialisation(model: LPD, std: float) -> LPD:
    """The model with new random weights: with those it begins with, the rows of its output barely differ."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def write_images(folder: Path, classes: dict[str, int], width: int, height: int) -> Path:
    """`folder/<class>/<number>.png`: so many random images of each class."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:04}.png")
    return folder
