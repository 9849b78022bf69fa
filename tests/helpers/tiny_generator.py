"""A generator with random weights, as files that a user would have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from engine.image_generator import ImageGenerator
from models import build_model
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import save_tokenizer
from util.checkpoint import save_checkpoint

NAMES = ["ash", "birch", "cedar", "date", "elm"]


def write_model(folder: Path, img_size: int = 24) -> tuple[Path, Path]:
    """A checkpoint and its tokenizer: stride 4, 12 codes, five classes."""
    torch.manual_seed(0)
    model = build_model("lpd_debug", img_size=img_size, stride=4, class_num=len(NAMES), vocab_size=12)
    torch.nn.init.normal_(model.head.weight)  # by default the classes barely differ
    content = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "classes": NAMES}
    save_checkpoint(folder / "model.pth", content)
    save_tokenizer(tiny_tokenizer(), folder / "tokenizer.pt")
    return folder / "model.pth", folder / "tokenizer.pt"


def exact_generator(folder: Path, img_size: int = 24) -> ImageGenerator:
    """In float64, so that the batch a picture is in cannot change its codes or bytes by rounding."""
    generator = ImageGenerator(*write_model(folder, img_size), device="cpu")
    generator.model.double()
    generator.tokenizer.double()
    return generator
