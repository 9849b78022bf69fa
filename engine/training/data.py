"""The training data as the flags name it: images, or a cache of their codes, and what its codes belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.recipes import TOKENIZER
from tokenizers import VQModel, picture_size
from util.data.codes import CodeDataset, open_codes
from util.data.images import ImageDataset, open_images
from util.errors import UserError
from util.files import sha256

# What the published cache layout, which has no header, was made with.
PUBLISHED_STRIDE, PUBLISHED_VOCAB = 16, 16384


@dataclass(frozen=True)
class CodeGeometry:
    """What the codes of a data set are: of images of `img_size` pixels, one per `stride` pixels, below `vocab_size`."""

    img_size: int
    stride: int
    vocab_size: int


def open_dataset(
    config: Config, tokenizer: VQModel | None, tokenizer_sha256: str | None, recorded: dict[str, Any]
) -> CodeDataset | ImageDataset:
    """The training data, at --img_size or else the size that the checkpoint records; images at the tokenizer's else.

    Raises:
        UserError: where no data is named, it cannot be read, or its codes are of another tokenizer.
    """
    data, recorded_size = config.data, recorded.get("img_size")
    img_size = recorded_size if config.model.img_size is None else config.model.img_size
    if not data.use_cached:
        if data.data_path is None:
            raise UserError("give training data: --data_path IMAGES, or --use_cached --cached_path CODES.")
        return open_images(data.data_path, picture_size(img_size, tokenizer), data.skip_broken)
    if data.cached_path is None:
        raise UserError("--use_cached needs --cached_path, a code cache made by main_cache.py.")
    # The published runs (--recipe) need no tokenizer but name one: codes of another are refused as far as can be told.
    published = config.recipe is not None and tokenizer_sha256 is None
    if published and Path(TOKENIZER).is_file():
        tokenizer_sha256 = sha256(TOKENIZER)
    dataset = open_codes(data.cached_path, img_size=img_size, tokenizer_hash=tokenizer_sha256)
    found = code_geometry(dataset, None)
    if published and (found.stride, found.vocab_size) != (PUBLISHED_STRIDE, PUBLISHED_VOCAB):
        raise UserError(
            f"cache {data.cached_path} was made with another tokenizer (stride {found.stride}, {found.vocab_size} "
            f"codes) than that of --recipe {config.recipe} (stride {PUBLISHED_STRIDE}, {PUBLISHED_VOCAB} codes); give "
            "a cache of the published one, or your tokenizer as --vqgan_path."
        )
    return dataset


def code_geometry(dataset: CodeDataset | ImageDataset, tokenizer: VQModel | None) -> CodeGeometry:
    """The geometry of the codes: the tokenizer's for images, what a code cache records for codes."""
    if isinstance(dataset, ImageDataset):
        assert tokenizer is not None
        return CodeGeometry(dataset.img_size, tokenizer.stride, tokenizer.config.codebook_size)
    header = dataset.header
    if header is None:
        return CodeGeometry(PUBLISHED_STRIDE * dataset.grid_size, PUBLISHED_STRIDE, PUBLISHED_VOCAB)
    return CodeGeometry(header.img_size, header.img_size // header.grid_size, header.vocab_size)
