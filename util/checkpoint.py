"""Checkpoints: plain data, written atomically, read without running code from the file.

A `.pth` holds a dict with `model` (state dict) and, for training, `optimizer`, `step`, `epoch`, `config` (the model's
configuration) and `args` (the run's record). In the published files `args` is an `argparse.Namespace`.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from util.errors import UserError
from util.exported import read_config
from util.files import atomic_write, write_json

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, torch.Tensor)


def save_checkpoint(
    path: str | Path, payload: dict[str, Any], before_replace: Callable[[], None] | None = None
) -> None:
    """Write `payload` atomically, and beside it, as `<name>.json`, the part that needs no torch to read.

    Args:
        before_replace: called when the new file is complete, just before it takes the place of the old one.

    Raises:
        OSError: if it can't be written; the old file is kept.
    """
    path = Path(path)
    with atomic_write(path) as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, hidden behind "unexpected pos"
                raise error.__context__ from None
            raise
        if before_replace is not None:
            file.flush()
            os.fsync(file.fileno())
            before_replace()
    readable = {k: v for k, v in payload.items() if k not in ("model", "optimizer") and not _holds_tensors(v)}
    write_json(path.with_suffix(".json"), readable)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a `.pth` or `.safetensors` file; a bare state dict comes back under the key `model`.

    The result of a `model.safetensors` includes what the `config.json` beside it says (:mod:`util.exported`).

    Raises:
        UserError: if the file is missing, damaged, or holds something else than plain data and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist.")
    try:
        payload = _read(path)
    except pickle.UnpicklingError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"checkpoint {path} is damaged or holds more than plain data and tensors ({reason}).") from None
    except Exception as error:  # a damaged file can make the readers fail in any way
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
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
    return payload | read_config(path)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if zipfile.is_zipfile(path):  # torch.load does not compare the check sums
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the check sum of {damaged} differs")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def saved_step(path: Path) -> int | None:
    """The step that a run's checkpoint was saved at, without reading its tensors; None if it can't be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # missing or damaged
        return None


def previous_name(age: int) -> str:
    """Name of the checkpoint that was `checkpoint-last.pth` `age` saves ago."""
    return f"checkpoint-last-{age}.pth"


def find_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a run, newest first.

    These are `checkpoint-last.pth`, which every save replaces, `checkpoint-last-<age>.pth`, what it was before, and
    `checkpoint-<epoch>.pth`.
    """
    folder = Path(folder)

    def numbered(pattern: str) -> list[tuple[int, Path]]:
        matches = ((re.fullmatch(pattern, path.name), path) for path in folder.glob("checkpoint-*.pth"))
        return sorted((int(match[1]), path) for match, path in matches if match)

    last = [folder / LAST] if (folder / LAST).is_file() else []
    previous = [path for _, path in numbered(r"checkpoint-last-(\d+)\.pth")]
    return last + previous + [path for _, path in reversed(numbered(r"checkpoint-(\d+)\.pth"))]


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
