"""A run's own checkpoint, tried before anything depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.hub.export import check_state
from engine.model_choice import recorded_config
from engine.training.optim import build_adamw, load_optimizer
from models.lpd import LPD
from util.checkpoint import load_checkpoint
from util.errors import UserError, reading
from util.shapes import shapes_only


def load_resumable(path: Path) -> dict[str, Any]:
    """Read a checkpoint from which a run can go on: weights, average and optimizer fit the model that it records.

    Raises:
        UserError: if the file is missing, damaged, not plain data of the right kinds, or holds weights only.
    """
    content = load_checkpoint(path)
    if not {"optimizer", "step", "config", "global_batch"} <= content.keys():
        raise UserError(f"checkpoint {path} can't be resumed, only used as --pretrained_ckpt: it holds weights only.")
    with reading("checkpoint", path):
        _try(content, path)
    return content


def check_continues(content: dict[str, Any], source: str, counted_in: dict[str, int], epochs: int) -> None:
    """Refuse to go on from a checkpoint as another run.

    Args:
        counted_in: what the number of a step means: `global_batch`, `num_samples` and `seed` of this run.

    Raises:
        UserError: naming what differs, or if the checkpoint has been trained for longer than `epochs`.
    """
    for name, value in counted_in.items():
        if content[name] != value:
            flags = " (--batch_size × --grad_accum × processes)" if name == "global_batch" else ""
            raise UserError(
                f"{source} is of a run with {name} {content[name]}{flags}, this one has {value}; resume with the same, "
                "or start a new run in another --output_dir, from these weights with --pretrained_ckpt."
            )
    trained = content["step"] / (counted_in["num_samples"] // counted_in["global_batch"])
    if trained > epochs:
        raise UserError(
            f"--epochs is {epochs}, but {source} was saved after {trained:.4g} epochs; give more epochs or another "
            "--output_dir."
        )


def _try(content: dict[str, Any], path: Path) -> None:
    """Do on the meta device, where it costs nothing, what resuming does; fails in any way where that would."""
    for name in ("step", "global_batch", "num_samples", "seed"):
        if type(content[name]) is not int or content[name] < 0:
            raise ValueError(f"{name} is {content[name]!r}")
    if not isinstance(content.get("tokenizer_sha256"), str | None):
        raise ValueError("tokenizer_sha256 is no text")
    config = recorded_config(content, path)
    if config is None:
        raise ValueError("config is None")
    for name in ("model", "model_ema"):
        if name in content:
            check_state(content[name], config, str(path))
    with shapes_only():
        optimizer = build_adamw(LPD(config), weight_decay=0.0)
    load_optimizer(optimizer, content["optimizer"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state[parameter]
            shapes = [moments[name].shape for name in ("exp_avg", "exp_avg_sq", "step")]
            if shapes != [parameter.shape, parameter.shape, ()]:
                raise ValueError("the optimizer is of another model")
