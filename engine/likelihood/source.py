"""A trained model and the images whose likelihood is asked for, opened and checked against each other."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.hub.remote import choose_tokenizer, choose_weights, own_tokenizer
from engine.model_choice import check_tokenizer, load_pretrained, recorded_config
from engine.named_files import TOKENIZER_MISSING, local_file
from engine.training.batch import codes_of
from engine.training.data import CodeGeometry, code_geometry, verify
from models import config_of_weights
from models.lpd import LPD, LPDConfig, load_weights
from tokenizers import VQModel, load_tokenizer, picture_size
from util.config import check, setting
from util.data.codes import CodeDataset, open_codes
from util.data.images import ImageDataset, open_images
from util.dist import DeviceConfig, Dist
from util.errors import UserError
from util.files import sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(DeviceConfig):
    """Which model, and which images: codes of a cache, or images that are encoded."""

    pretrained_ckpt: Path = setting(help="the model: a checkpoint, an exported folder, or user/model on the hub")
    use_ema: bool = setting(False, "take its moving average of the weights")
    vqgan_path: Path | None = setting(
        None, "its tokenizer, to encode images (default: that of --pretrained_ckpt, where it is an exported folder)"
    )
    cached_path: Path | None = setting(None, "codes of held-out images, a cache made by main_cache.py")
    data_path: Path | None = setting(None, "held-out images instead: a folder, or photos.npz:test")
    num_images: int | None = setting(None, "spread over the data set (default: all)", at_least=2)
    batch_size: int = setting(64, "images per process and pass", at_least=1)

    def __post_init__(self) -> None:
        check(self)
        if (self.cached_path is None) == (self.data_path is None):
            raise UserError("give either --cached_path, codes of held-out images, or --data_path, the images.")


@dataclass(frozen=True)
class HeldOut:
    """Images, by their numbers 0 … N − 1, as codes."""

    dataset: CodeDataset | ImageDataset
    tokenizer: VQModel | None  # for images
    numbers: np.ndarray  # int64 (N,), in the data set
    labels: np.ndarray  # int64 (N,), the model's classes
    fingerprint: str  # of images, codes and labels
    device: torch.device

    def __len__(self) -> int:
        return len(self.numbers)

    def codes(self, images: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (B, L) in raster order and classes (B,) of these images, int64 on the device."""
        rows = self.numbers[images]
        if isinstance(self.dataset, CodeDataset):
            codes = self.dataset.get_batch(rows)[0].to(self.device)
        else:
            pixels = torch.stack([self.dataset.load(int(row)) for row in rows]).to(self.device)
            not_mirrored = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
            codes = codes_of([pixels], not_mirrored, self.tokenizer)
        return codes, torch.from_numpy(self.labels[images]).to(self.device)


@dataclass(frozen=True)
class Source:
    """The model on its device, in eval mode, and the images."""

    model: LPD
    images: HeldOut
    record: dict[str, Any]  # files and hashes, for the results


def open_source(config: SourceConfig, dist: Dist) -> Source:
    """Open and check model and images; called by all processes.

    Raises:
        UserError: for a file that is missing or damaged, codes of another tokenizer or grid, classes that the model
            lacks, or fewer images than asked for.
    """
    weights = local_file(config.pretrained_ckpt, choose_weights, dist)
    checkpoint = load_pretrained(weights, config.use_ema)
    tokenizer_path = config.vqgan_path or own_tokenizer(config.pretrained_ckpt)
    if tokenizer_path is None and config.data_path is not None:
        raise UserError(TOKENIZER_MISSING)
    tokenizer, tokenizer_sha256 = None, checkpoint.get("tokenizer_sha256")
    if tokenizer_path is not None:
        tokenizer_file = local_file(tokenizer_path, choose_tokenizer, dist)
        tokenizer = load_tokenizer(tokenizer_file, dist.device)
        tokenizer_sha256 = sha256(tokenizer_file)
        check_tokenizer(checkpoint, weights, tokenizer_sha256)
    recorded = recorded_config(checkpoint, weights)
    dataset: CodeDataset | ImageDataset
    if config.cached_path is not None:
        dataset = open_codes(config.cached_path, tokenizer_hash=tokenizer_sha256)
        verify(dataset, dist)
    else:
        assert config.data_path is not None
        size = picture_size(None if recorded is None else recorded.img_size, tokenizer)
        dataset = open_images(config.data_path, size)
    geometry = code_geometry(dataset, tokenizer)
    model_config = recorded or config_of_weights(checkpoint["model"], geometry.stride)
    _check_geometry(dataset, geometry, model_config)
    if isinstance(dataset, CodeDataset):
        dataset.vocab_size = model_config.vocab_size
    labels = _labels(dataset, checkpoint.get("classes"), model_config.class_num)
    total = len(dataset)
    count = total if config.num_images is None else config.num_images
    if count > total:
        raise UserError(f"--num_images is {count}, but {config.cached_path or config.data_path} holds {total} images.")
    numbers = np.arange(count) * total // count
    model = LPD(model_config)
    load_weights(model, checkpoint["model"], str(weights))
    images = HeldOut(dataset, tokenizer, numbers, labels[numbers], _fingerprint(dataset, numbers), dist.device)
    record = {
        "pretrained_ckpt": {"path": str(weights), "sha256": sha256(weights)},
        "tokenizer_sha256": tokenizer_sha256,
        "images": str(config.cached_path or config.data_path),
    }
    return Source(model.to(dist.device).eval().requires_grad_(False), images, record)


def _check_geometry(dataset: CodeDataset | ImageDataset, found: CodeGeometry, model: LPDConfig) -> None:
    where = dataset.path if isinstance(dataset, CodeDataset) else dataset.source
    for name, what in (("img_size", "pixels"), ("stride", "pixels per token"), ("vocab_size", "codes in the codebook")):
        theirs, mine = getattr(found, name), getattr(model, name)
        if theirs != mine:
            raise UserError(
                f"the codes of {where} are of {theirs} {what}, the model's of {mine}; they must be the same."
            )


def _labels(dataset: CodeDataset | ImageDataset, known: Sequence[str] | None, class_num: int) -> np.ndarray:
    """The model's classes of all images, int64 (N,): by name, where the checkpoint has names, else by number."""
    names = dataset.classes
    if known is not None and list(known)[: len(names)] != names:
        if missing := [name for name in names if name not in known]:
            shown = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
            raise UserError(f"the model has no class {missing[0]!r}, which images have; its classes are {shown}.")
        logger.info("classes are matched by their names")
        return np.array([list(known).index(name) for name in names])[dataset.labels]
    if len(names) > class_num:
        raise UserError(f"the images are of {len(names)} classes, but the model has {class_num}.")
    return np.asarray(dataset.labels)


def _fingerprint(dataset: CodeDataset | ImageDataset, numbers: np.ndarray) -> str:
    if isinstance(dataset, ImageDataset):
        content = dataset.fingerprint()
    elif dataset.header is not None:
        content = "".join(dataset.header.files.values())
    else:
        content = dataset.fingerprint()  # type: ignore[attr-defined]
    return hashlib.sha256(content.encode() + numbers.tobytes()).hexdigest()
