"""Checkpoints: plain data, written atomically, read without running code from the file.

A `.pth` holds a dict with `model` (state dict) and, for training, `optimizer`, `model_ema` (if there is one), `step`,
`epoch`, `config` (the model's configuration) and `args` (the run's record). In the published files `args` is an
`argparse.Namespace`. A model to share is a folder with a `model.safetensors` and a `config.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from util.errors import UserError, reading
from util.files import atomic_write, content_sha256, sha256, write_json
from util.readers import read_json

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"
TENSORS = ("model", "model_ema", "optimizer")  # keys of a checkpoint whose values are or hold tensors
EXPORTED_MODEL, EXPORTED_CONFIG = "model.safetensors", "config.json"
EXPORT_FORMAT = {"format": "lpd", "format_version": 1}  # in the config.json
HASHES = {"weights_sha256", "config_sha256"}  # likewise: of the weights' file, and of the config.json's other values


def save_torch(path: str | Path, content: Any) -> None:
    """Write plain data and tensors with torch, atomically.

    Raises:
        OSError: if it can't be written; the old file is kept.
    """
    with atomic_write(path) as file:
        torch.save(content, file)


def save_safetensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as a `.safetensors` file, atomically; the same content gives the same bytes.

    Raises:
        OSError: if it can't be written; the old file is kept.
    """
    # Not the library's `save_file`, which puts a file of its own, of mode 0600, in the place of this one.
    written = safetensors.torch.save(tensors, metadata=metadata)
    end = 8 + int.from_bytes(written[:8], "little")
    header = json.loads(written[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))  # the library writes them in another order each time
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(written)[end:])


def save_checkpoint(path: str | Path, payload: dict[str, Any]) -> None:
    """Write `payload` atomically, and what is readable without torch to `<name>.json`. OSError as `save_torch`."""
    path = Path(path)
    save_torch(path, payload)
    write_json(path.with_suffix(".json"), {key: value for key, value in payload.items() if key not in TENSORS})


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a `.pth` or `.safetensors` file; a bare state dict comes back under the key `model`.

    An exported model's has `config`, `classes` and `tokenizer_sha256` as well, from the `config.json` in its folder.

    Raises:
        UserError: if the file is missing, damaged, holds something else than plain data and tensors, or weights that
            are not finite.
    """
    path = Path(path)
    with reading("checkpoint", path):
        payload = _read(path)
    if not isinstance(payload, dict):
        raise UserError(f"checkpoint {path} holds a {type(payload).__name__}; expected a dict with the key 'model'.")
    if "model" not in payload:
        payload = {"model": payload}
    if not _is_state_dict(payload["model"]):
        raise UserError(f"checkpoint {path} holds no state dict, neither under the key 'model' nor by itself.")
    if payload.get("model_ema") is not None and not _is_state_dict(payload["model_ema"]):
        raise UserError(f"checkpoint {path} holds no state dict under the key 'model_ema'.")
    with reading("checkpoint", path):
        for key in ("model", "model_ema"):
            for name, tensor in (payload.get(key) or {}).items():
                if not _is_finite(tensor):
                    raise UserError(f"checkpoint {path} holds weights that are not finite: {name} under {key!r}.")
    return payload | _read_exported_config(path)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(one, torch.Tensor) for one in value.values())


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # Both limits are NaN if one value is. This reads the memory once; isfinite().all() takes many times as long.
    return all(bool(limit.isfinite()) for limit in torch.aminmax(tensor.float()))


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if zipfile.is_zipfile(path):  # torch.load does not compare the check sums
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the check sum of {damaged} differs")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_exported_config(weights: Path) -> dict[str, Any]:
    """What the `config.json` of an exported model says; nothing for other files, or if it is another project's."""
    path = weights.with_name(EXPORTED_CONFIG)
    if weights.name != EXPORTED_MODEL or not path.is_file():
        return {}
    values = read_json("model configuration", path)
    ours = isinstance(values, dict) and (values.get("format") == EXPORT_FORMAT["format"] or HASHES & values.keys())
    if not ours:
        return {}
    version, known = values.get("format_version"), EXPORT_FORMAT["format_version"]
    if version != known:
        raise UserError(f"{path} has format version {version}; this code reads version {known}.")
    if HASHES & values.keys():  # folders of earlier exports have none
        for file, key, found in (
            (path, "config_sha256", content_sha256(values, "config_sha256")),
            (weights, "weights_sha256", sha256(weights)),
        ):
            if values.get(key) != found:
                raise UserError(f"{file} is damaged or has changed since the export: its SHA-256 differs.")
    config, classes, tokenizer = (values.get(key) for key in ("config", "classes", "tokenizer_sha256"))
    numbers = isinstance(config, dict) and all(isinstance(value, int | float) for value in config.values())
    names = classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))
    if not numbers or not names or not isinstance(tokenizer, str | None):
        raise UserError(f"{path} does not describe a model: 'config', 'classes' or 'tokenizer_sha256' is damaged.")
    return {"config": config, "classes": classes, "tokenizer_sha256": tokenizer}


def saved_step(path: Path) -> int | None:
    """The step that a run's checkpoint was saved at, without reading its tensors; None if it can't be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # missing or damaged
        return None


def last_name(age: int) -> str:
    """Name of the checkpoint that was `checkpoint-last.pth` `age` saves ago."""
    return f"checkpoint-last-{age}.pth" if age else LAST


def find_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a run, newest first.

    These are `checkpoint-last.pth`, which every save replaces, `checkpoint-last-<age>.pth`, what it was before, and
    `checkpoint-<epoch>.pth`.
    """
    found = {}
    for path in Path(folder).glob("checkpoint-*.pth"):
        if match := re.fullmatch(r"checkpoint-(?:last(?:-(\d+))?|(\d+))\.pth", path.name):
            age, epoch = match.groups()
            found[(0, int(age or 0)) if epoch is None else (1, -int(epoch))] = path
    return [path for _, path in sorted(found.items())]


def load_newest(
    folder: str | Path, load: Callable[[Path], dict[str, Any]] = load_checkpoint
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read; damaged ones are skipped with a warning. None if there is none.

    Args:
        load: reads one, with a UserError for whatever is wrong with it.

    Raises:
        UserError: if there are checkpoints but none can be read.
    """
    paths = find_checkpoints(folder)
    for path in paths:
        try:
            return path, load(path)
        except UserError as error:
            logger.warning("skipped: %s", error)
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be read.")
    return None
