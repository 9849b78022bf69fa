"""Checkpoints: plain data, written whole or not at all, read without running code from the file.

A `.pth` holds a dict with `model` (state dict) and, for training, `optimizer`, `step`, `epoch`, `config` (the model's
configuration) and `args` (the run's settings). The published files fit: their `args` is an `argparse.Namespace`.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from util.errors import UserError
from util.files import atomic_write, write_json

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"


def save_checkpoint(path: str | Path, payload: dict[str, Any]) -> None:
    """Write `payload` atomically, and beside it what of it is readable without torch, as `<name>.json`."""
    path = Path(path)
    with atomic_write(path) as file:
        torch.save(payload, file)
    write_json(path.with_suffix(".json"), {k: v for k, v in payload.items() if k not in ("model", "optimizer")})


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a `.pth` or `.safetensors` file; a bare state dict comes back under the key `model`.

    Raises:
        UserError: if the file is missing, truncated, or holds something else than plain data and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist.")
    if path.suffix == ".safetensors":
        try:
            return {"model": safetensors.torch.load_file(path)}
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {path} is damaged or no safetensors file ({error}).") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"checkpoint {path} is damaged or holds more than plain data and tensors ({reason}).") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is truncated or damaged ({reason}).") from None
    if not isinstance(payload, dict):
        raise UserError(
            f"checkpoint {path} holds a {type(payload).__name__}; it must hold a dict with the key 'model'."
        )
    if "model" not in payload:
        payload = {"model": payload}
    state = payload["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"checkpoint {path} holds no state dict, neither under the key 'model' nor by itself.")
    return payload


def find_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a run, newest first: `checkpoint-last.pth`, which every save renews, then the others by epoch."""
    folder = Path(folder)
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*.pth")
        if (match := re.fullmatch(r"checkpoint-(\d+)\.pth", path.name))
    ]
    last = [folder / LAST] if (folder / LAST).is_file() else []
    return last + [path for _, path in sorted(numbered, reverse=True)]


def load_newest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read; damaged ones are skipped with a warning. None if there is none.

    Raises:
        UserError: if there are checkpoints but none can be read.
    """
    paths = find_checkpoints(folder)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            logger.warning("skipped: %s", error)
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be read.")
    return None
