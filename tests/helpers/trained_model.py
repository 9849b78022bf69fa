"""A tiny model with its tokenizer, as a training leaves them, and as an exported folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engine.hub.export import export
from tests.helpers.evaluation_case import networks
from tests.helpers.tiny_models import far_from_initialisation
from tokenizers import save_tokenizer
from util.checkpoint import save_checkpoint

CLASS_NAMES = ["ash", "birch", "cedar", "date", "elm"]


def write_trained(folder: Path) -> Path:
    """Writes `model.pth`, `tokenizer.pt` and `exported`, of random weights, into a folder; returns it."""
    model, tokenizer = networks()
    state = far_from_initialisation(model, 0.3).float().state_dict()
    content = {"model": state, "config": dataclasses.asdict(model.config), "classes": CLASS_NAMES}
    save_checkpoint(folder / "model.pth", content)
    save_tokenizer(tokenizer, folder / "tokenizer.pt")
    export(folder / "model.pth", folder / "exported", vqgan_path=folder / "tokenizer.pt")
    return folder
