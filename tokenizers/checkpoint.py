"""Tokenizers as files: the released one and those trained here.

A ``.pt`` file is a dict with the state dict under ``model`` and, for those trained here, the plain-data ``config`` and
``quality`` beside it; a ``.safetensors`` file holds the same tensors, the other two as JSON in its metadata. Without a
config the released size is assumed. Files are read without running code from them.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from tokenizers.vq_model import VQConfig, VQModel
from util.checkpoint import load_checkpoint, save_safetensors, save_torch
from util.config import record
from util.errors import UserError
from util.shapes import shapes_only

logger = logging.getLogger(__name__)

RELEASED = (
    "the released tokenizer is vq_ds16_c2i.pt of https://huggingface.co/FoundationVision/LlamaGen; "
    "python -m engine.hub download vq_ds16_c2i puts it into checkpoints/"
)
# Figures of held-out pictures and of their reconstructions that a tokenizer's file may have.
QUALITY = ("psnr_db", "ssim", "class_accuracy_real", "class_accuracy_reconstructed")


def load_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> VQModel:
    """Read a tokenizer: the released ``vq_ds16_c2i.pt`` (also as a bare state dict) or one saved by this project.

    Returns a float32 model in eval mode on ``device`` with frozen parameters.

    Raises:
        UserError: when the file is missing, damaged, or does not hold exactly the parameters of its size.
    """
    path = Path(path)
    try:
        content = load_checkpoint(path)
    except UserError as error:
        raise UserError(f"tokenizer file: {str(error).rstrip('.')}; {RELEASED}.") from error
    state, described = content["model"], content.get("config")
    _check_kind(state, described, path)
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {}).get("config", "null"))
        config = VQConfig(**described or {})
    except (TypeError, ValueError) as error:
        raise UserError(f"tokenizer file {str(path)!r} has a bad config {described!r}: {error}") from error
    with shapes_only():
        model = VQModel(config)
    _check_parameters(state, model.state_dict(), path)
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)


def save_tokenizer(
    model: VQModel, path: str | Path, quality: dict[str, float] | None = None, bf16: bool = False
) -> None:
    """Write ``model``, its configuration and its QUALITY to a ``.pt`` or ``.safetensors`` file, atomically.

    Args:
        bf16: weights of half the size.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if bf16:
        state = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    described = {"config": record(model.config), "quality": quality or {}}
    if path.suffix == ".safetensors":
        save_safetensors(path, state, {name: json.dumps(value) for name, value in described.items()})
    else:
        save_torch(path, {"model": state, **described})


def read_quality(path: Path) -> dict[str, float]:
    """What a tokenizer's file says its reconstructions are worth (QUALITY); nothing where it does not say it."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {})["quality"])
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["quality"]
        return {name: float(found[name]) for name in QUALITY if name in found}
    except Exception:  # another project's file; what is damaged is said by load_tokenizer
        return {}


def log_quality(path: Path) -> None:
    """Log in a line what a tokenizer's reconstructions are worth; nothing where its file does not say it."""
    values = read_quality(path)
    if not {"psnr_db", "ssim"} <= {*values}:
        return
    text = f"tokenizer: PSNR {values['psnr_db']:.1f} dB, SSIM {values['ssim']:.2f} on held-out pictures"
    if {*QUALITY} <= {*values}:
        made, real = values["class_accuracy_reconstructed"], values["class_accuracy_real"]
        text += f"; its reconstructions are read right {made:.1%} of the time, the pictures {real:.1%}"
    logger.info(text)


def picture_size(asked: int | None, tokenizer: VQModel | None) -> int:
    """Side of the pictures to encode, pixels: `asked`, else that of the tokenizer's training, else 256.

    Logs a warning where the two are known and differ.
    """
    trained = None if tokenizer is None else tokenizer.config.img_size
    if asked is not None and trained is not None and asked != trained:
        logger.warning("the tokenizer was trained on pictures of %d px, those to encode have %d px", trained, asked)
    if tokenizer is not None and asked is None and trained is None:
        logger.info("the tokenizer does not record the size of its pictures; taking 256 px (--img_size)")
    return next(size for size in (asked, trained, 256) if size is not None)


def _check_kind(state: dict[str, Tensor], described: Any, path: Path) -> None:
    """Refuse what is something else than a tokenizer."""
    if "class_emb.weight" in state:
        raise UserError(
            f"{path} is a checkpoint of an LPD model, not a tokenizer; give it as --pretrained_ckpt, and the tokenizer "
            "of its codes as --vqgan_path."
        )
    if isinstance(described, dict) and (unknown := described.keys() - VQConfig.__dataclass_fields__.keys()):
        raise UserError(
            f"{path} is not a tokenizer: its config has {', '.join(sorted(unknown))}; {RELEASED}, "
            "python -m tokenizers.train makes one."
        )


def _check_parameters(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    for name in [*expected, *state]:
        if name not in state:
            problem = "is missing"
        elif name not in expected:
            problem = "is unknown"
        elif state[name].shape != expected[name].shape:
            problem = f"has shape {tuple(state[name].shape)} and should have {tuple(expected[name].shape)}"
        else:
            continue
        raise UserError(f"tokenizer file {str(path)!r} does not fit: {name} {problem}; {RELEASED}.")
