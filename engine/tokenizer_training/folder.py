"""What a training of a tokenizer finds in its folder: the figures and the state of an earlier run, or another training.

A tokenizer that is finished, or of which nothing is known, is never overwritten: code caches and models depend on it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from util.checkpoint import load_checkpoint
from util.errors import UserError, reading
from util.readers import read_json

log = logging.getLogger(__name__)

TOKENIZER, METRICS, LOG, STATE = "tokenizer.pt", "metrics.json", "metrics.jsonl", "state.pth"
_MAY_CHANGE = ("num_workers", "eval_freq")  # between runs of one training


def read_earlier(folder: Path, described: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """State and last figures of an earlier run of this training; None for what there is not or can't be read.

    The state of a finished training is not read, unless it is to be extended.

    Args:
        described: this training: ``tokenizer``, ``training`` (records of the configurations) and ``train_images``.

    Raises:
        UserError: if the folder belongs to another training, or its tokenizer would be lost by starting over.
    """
    metrics, state, damage = None, None, ""
    try:
        metrics = _read_record(folder / METRICS, partial(read_json, "figures of a training"))
    except UserError as error:
        log.warning("%s", error)
    if metrics is not None:
        extended = _is_extended(folder, metrics, described)
        if is_finished(folder, metrics) and not extended:
            return None, metrics
    try:
        state = _read_record(folder / STATE, load_checkpoint)
    except UserError as error:
        damage = str(error)
    if state is None:
        start_over(folder, metrics, damage or f"{folder / STATE} is missing.")
    else:
        _is_extended(folder, state, described)
    return state, metrics


def is_finished(folder: Path, metrics: dict[str, Any]) -> bool:
    """Whether a training came to its end, and its tokenizer is there."""
    return metrics["step"] == metrics["training"]["steps"] and (folder / TOKENIZER).exists()


def start_over(folder: Path, metrics: dict[str, Any] | None, reason: str) -> None:
    """Say why a training does not go on from an earlier run; nothing for a new folder.

    Raises:
        UserError: where a finished tokenizer, or one of which nothing is known, would be lost.
    """
    if metrics is None and (folder / TOKENIZER).exists():
        raise UserError(
            f"{folder} holds a {TOKENIZER} and no readable record of its training; give another --output_dir."
        )
    if metrics is not None and is_finished(folder, metrics):
        raise UserError(
            f"the finished {folder / TOKENIZER} can't be trained further: {reason.rstrip('.')}; give another "
            "--output_dir, and this one as --vqgan_path to start from it."
        )
    if metrics is not None or (folder / STATE).exists():
        log.warning("training starts from the beginning: %s", reason)


def _read_record(path: Path, read: Callable[[Path], Any]) -> dict[str, Any] | None:
    """What a run of a training wrote, with ``step`` and what :func:`read_earlier` calls ``described``."""
    if not path.exists():
        return None
    with reading("record of a training", path):
        found = read(path)
        step, steps = found["step"], _flat(found)["steps"]
        if type(step) is not int or type(steps) is not int or not 0 <= step <= steps:
            raise ValueError(f"step {step!r} of {steps!r}")
    return found


def _is_extended(folder: Path, earlier: dict[str, Any], described: dict[str, Any]) -> bool:
    """Whether this is an earlier training with more steps; UserError if it is another training."""
    before, now = _flat(earlier), _flat(described)
    extended = now["steps"] > before["steps"]
    for name, value in now.items():
        # A record of an earlier version may lack a name.
        if name in _MAY_CHANGE or before.get(name, value) == value or (name == "steps" and extended):
            continue
        remedy = f"give at least {before[name]}, or" if name == "steps" else "delete it, or give"
        raise UserError(
            f"{folder} holds a tokenizer trained with {name} {before[name]}, not {value}; {remedy} another "
            "--output_dir."
        )
    return extended


def _flat(described: dict[str, Any]) -> dict[str, Any]:
    names = ("tokenizer", "training", "train_images")
    described = json.loads(json.dumps({name: described[name] for name in names}))  # tuples compare as lists
    count = described["train_images"]
    return {**described["tokenizer"], **described["training"], "number of training images": count}
