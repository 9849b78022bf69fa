"""The training data as the flags name it: images, or a cache of their codes, and what its codes belong to."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config
from engine.recipes import TOKENIZER
from engine.training.config import DataConfig
from tokenizers import VQModel, picture_size
from util.data.classes import tell
from util.data.codes import CodeDataset, MappedCodes, open_codes, verify_files
from util.data.images import ImageDataset, open_images
from util.dist import Dist
from util.errors import UserError
from util.files import sha256

logger = logging.getLogger(__name__)

# What the published cache layout, which has no header, was made with.
PUBLISHED_STRIDE, PUBLISHED_VOCAB = 16, 16384


@dataclass(frozen=True)
class CodeGeometry:
    """What the codes of a data set are: of images of `img_size` pixels, one per `stride` pixels, below `vocab_size`."""

    img_size: int
    stride: int
    vocab_size: int


def verify(
    dataset: CodeDataset | ImageDataset | None, dist: Dist, *, again: bool = False, remember: bool = True
) -> None:
    """Compare a code cache with its check sums, once for all processes; as :func:`verify_files` otherwise."""
    if isinstance(dataset, MappedCodes):
        dist.on_main(partial(verify_files, dataset.path, again=again, remember=remember))


def open_dataset(
    config: Config, tokenizer: VQModel | None, tokenizer_sha256: str | None, recorded: dict[str, Any]
) -> CodeDataset | ImageDataset:
    """The training data, at --img_size or else the size that the checkpoint records; images at the tokenizer's else.

    Raises:
        UserError: where it cannot be read, or its codes are of another tokenizer.
    """
    data, recorded_size = config.data, recorded.get("img_size")
    img_size = recorded_size if config.model.img_size is None else config.model.img_size
    if not data.use_cached:
        assert data.data_path is not None
        return open_images(data.data_path, picture_size(img_size, tokenizer), data.skip_broken, choice=data.choice)
    assert data.cached_path is not None
    # The published runs (--recipe) need no tokenizer but name one: codes of another are refused as far as can be told.
    published = config.recipe is not None and tokenizer_sha256 is None
    if published and Path(TOKENIZER).is_file():
        tokenizer_sha256 = sha256(TOKENIZER)
    dataset = open_codes(data.cached_path, img_size=img_size, tokenizer_hash=tokenizer_sha256)
    tell(str(data.cached_path), dataset.classes, len(dataset))
    found = code_geometry(dataset, None)
    if published and (found.stride, found.vocab_size) != (PUBLISHED_STRIDE, PUBLISHED_VOCAB):
        raise UserError(
            f"cache {data.cached_path} was made with another tokenizer (stride {found.stride}, {found.vocab_size} "
            f"codes) than that of --recipe {config.recipe} (stride {PUBLISHED_STRIDE}, {PUBLISHED_VOCAB} codes); give "
            "a cache of the published one, or your tokenizer as --vqgan_path."
        )
    return dataset


def open_validation(
    data: DataConfig,
    training_data: CodeDataset | ImageDataset,
    codes: CodeGeometry,
    tokenizer: VQModel | None,
    tokenizer_sha256: str | None,
) -> CodeDataset | ImageDataset | None:
    """The images, or their codes, that --val_path or --val_cached_path names, or None; labels as in the training data.

    Raises:
        UserError: where they cannot be read, or do not fit the training data.
    """
    path = data.val_cached_path or data.val_path
    if path is None:
        return None
    if data.val_cached_path is None:
        assert tokenizer is not None
        dataset: CodeDataset | ImageDataset = open_images(path, codes.img_size, data.skip_broken, choice=data.choice)
    else:
        dataset = open_codes(path, img_size=codes.img_size, tokenizer_hash=tokenizer_sha256)
        if (found := code_geometry(dataset, None)) != codes:
            raise UserError(
                f"cache {path} was made with another tokenizer (stride {found.stride}, {found.vocab_size} codes) than "
                f"the training data (stride {codes.stride}, {codes.vocab_size} codes)."
            )
        dataset.vocab_size = codes.vocab_size
    classes = training_data.classes
    if unknown := sorted(set(dataset.classes) - set(classes)):
        raise UserError(
            f"{path} has classes that are not trained on ({', '.join(unknown[:3])}{', …' if unknown[3:] else ''}); "
            "its class names must be among those of the training data."
        )
    dataset.labels = np.array([classes.index(name) for name in dataset.classes], np.int64)[dataset.labels]
    images = _images_of(dataset)
    if images is not None and images == _images_of(training_data):
        logger.warning("%s holds the images that are trained on: its loss can't show overfitting", path)
    return dataset


def _images_of(dataset: CodeDataset | ImageDataset) -> tuple[str, str] | None:
    """What tells the images of a data set from others, as a code cache records it; None where nothing does."""
    if isinstance(dataset, ImageDataset):
        return dataset.source, dataset.fingerprint()
    return None if dataset.header is None else (dataset.header.source, dataset.header.source_sha256)


def code_geometry(dataset: CodeDataset | ImageDataset, tokenizer: VQModel | None) -> CodeGeometry:
    """The geometry of the codes: the tokenizer's for images, what a code cache records for codes."""
    if isinstance(dataset, ImageDataset):
        assert tokenizer is not None
        return CodeGeometry(dataset.img_size, tokenizer.stride, tokenizer.config.codebook_size)
    header = dataset.header
    if header is None:
        return CodeGeometry(PUBLISHED_STRIDE * dataset.grid_size, PUBLISHED_STRIDE, PUBLISHED_VOCAB)
    return CodeGeometry(header.img_size, header.img_size // header.grid_size, header.vocab_size)
