"""The code cache: the tokenizer's codes of images, as training reads them.

A code cache, written by :mod:`engine.cache`, is a folder of
    ``codes.npy``, ``codes_flip.npy``   (N, L) uint16: raster codes of each cropped image and of its mirror image
    ``labels.npy``                      (N,) int64
    ``header.json``                     see :class:`CacheHeader`; written last, so a cache without it is unfinished
The published layout, one ``<class>/<image>.npz`` per image with ``indices`` and ``indices_flip``, is read as well.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import logging
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data.images import list_class_folders
from util.errors import UserError

logger = logging.getLogger(__name__)

HEADER = "header.json"
PARTS = ".parts"  # subfolder of an unfinished cache; hidden, so that it is not taken for a class
CODES, CODES_FLIP, LABELS = "codes.npy", "codes_flip.npy", "labels.npy"
CACHE_FORMAT, CACHE_VERSION = "lpd-codes", 1

T = TypeVar("T")
CodeBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class CacheHeader:
    """What a code cache was made of; ``header.json`` holds these fields."""

    img_size: int  # side of the crop, pixels
    grid_size: int  # side of the code grid; L = grid_size²
    num_images: int  # N
    classes: list[str]  # names, by label
    tokenizer_sha256: str  # of the tokenizer's file
    vocab_size: int  # the tokenizer's codebook size
    max_code: int
    crop: str
    source: str  # path of the images, or of the cache that was converted
    source_sha256: str  # of the list of images: ImageDataset.fingerprint, or the relative paths of that cache
    skipped: list[str]  # broken images that were left out, with the reason
    files: dict[str, str]  # name → SHA-256
    format: str = CACHE_FORMAT
    version: int = CACHE_VERSION

    @staticmethod
    def read(cache: Path) -> CacheHeader:
        """Read ``cache/header.json``; UserError if the cache is unfinished or the header another file."""
        path = cache / HEADER
        if not path.is_file():
            raise UserError(f"{cache} is an unfinished cache; run main_cache.py again to finish it.")
        try:
            values = json.loads(path.read_text())
            header = CacheHeader(**values)
        except (ValueError, TypeError):
            raise UserError(f"{path} is not the header of a code cache of version {CACHE_VERSION}.") from None
        if (header.format, header.version) != (CACHE_FORMAT, CACHE_VERSION):
            raise UserError(
                f"{path} is of format {header.format!r} version {header.version}; expected {CACHE_FORMAT!r} version "
                f"{CACHE_VERSION}."
            )
        return header


class CodeDataset(Dataset[CodeBatch], abc.ABC):
    """Codes of images; :func:`open_codes` makes one from either format.

    ``get_batch(indices)`` returns ``(codes (B, L), codes_flip (B, L), labels (B,))``, int64 tensors in raster order. A
    ``DataLoader`` with a batch sampler gets the same tuple by ``collate_fn=whole_batch``.
    """

    header: CacheHeader | None = None  # None for the published layout, which has none

    def __init__(self, path: Path, classes: list[str], labels: np.ndarray, num_tokens: int) -> None:
        self.path = path
        self.classes = classes
        self.labels = labels  # (N,) int64
        self.num_tokens = num_tokens
        self.vocab_size = np.iinfo(np.int64).max  # codes are checked against it; lowered where it is known
        self.grid_size = math.isqrt(num_tokens)
        if self.grid_size**2 != num_tokens:
            raise UserError(f"{path} holds {num_tokens} codes per image; expected a square grid.")

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Plain and mirrored codes, (B, L) of any integer type."""

    def get_batch(self, indices: Sequence[int] | np.ndarray) -> CodeBatch:
        rows = np.asarray(indices, dtype=np.int64)
        pair = [codes.astype(np.int64, copy=False) for codes in self._read(rows)]
        for codes in pair:
            # Seen as unsigned, negative codes are too large as well.
            if codes.size and codes.view(np.uint64).max() >= self.vocab_size:
                row, column = np.argwhere((codes < 0) | (codes >= self.vocab_size))[0]
                raise UserError(
                    f"sample {rows[row]} of {self.path} holds code {codes[row, column]}; the codebook has codes 0 to "
                    f"{self.vocab_size - 1}."
                )
        return torch.from_numpy(pair[0]), torch.from_numpy(pair[1]), torch.from_numpy(self.labels[rows])

    # A batch sampler's list of indices arrives here; what is returned goes to collate_fn.
    __getitems__ = get_batch

    def __getitem__(self, index: int) -> CodeBatch:
        """One sample: codes (L,), codes_flip (L,), label ()."""
        codes, codes_flip, labels = self.get_batch([index])
        return codes[0], codes_flip[0], labels[0]


class MappedCodes(CodeDataset):
    """A code cache: rows of memory-mapped files, so that opening it reads only the header and the labels."""

    def __init__(self, path: Path) -> None:
        self.header: CacheHeader = CacheHeader.read(path)
        labels = _load_array(path / LABELS, (self.header.num_images,), np.int64, mmap=False)
        super().__init__(path, self.header.classes, labels, self.header.grid_size**2)
        self.vocab_size = self.header.vocab_size
        self._open()

    def _open(self) -> None:
        shape = (len(self.labels), self.num_tokens)
        self._codes = _load_array(self.path / CODES, shape, np.uint16)
        self._codes_flip = _load_array(self.path / CODES_FLIP, shape, np.uint16)

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._codes[indices], self._codes_flip[indices]

    # A pickled memory map is a copy of the whole file: workers that are not forked open the file again.
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_codes", "_codes_flip")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class NpzCodes(CodeDataset):
    """The published layout: ``<class>/<image>.npz`` with ``indices`` and ``indices_flip``."""

    def __init__(self, path: Path) -> None:
        classes, self.paths, labels = list_class_folders(path, {".npz"}, "code files")
        first, _ = _load_npz(path / self.paths[0])
        super().__init__(path, classes, labels, len(first))

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = np.empty((2, len(indices), self.num_tokens), dtype=np.int64)
        for row, index in enumerate(indices):
            file = self.path / self.paths[index]
            for side, values in enumerate(_load_npz(file)):
                if len(values) != self.num_tokens:
                    raise UserError(f"{file} holds {len(values)} codes, other files {self.num_tokens}.")
                codes[side, row] = values
        return codes[0], codes[1]


def _load_array(path: Path, shape: tuple[int, ...], dtype: type, mmap: bool = True) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r" if mmap else None)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); delete the cache and make it again.") from None
    if array.shape != shape or array.dtype != dtype:
        found, wanted = f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}"
        raise UserError(f"{path} holds {found}, the header says {wanted}; delete the cache and make it again.")
    return array


def _load_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """``indices`` and ``indices_flip``, flat integer arrays."""
    try:
        with np.load(path) as file:
            pair = file["indices"].reshape(-1), file["indices_flip"].reshape(-1)
    except KeyError as error:
        raise UserError(f"{path} has no array {error}; expected 'indices' and 'indices_flip'.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable file of codes ({error}).") from None
    if any(array.dtype.kind not in "iu" for array in pair) or len(pair[0]) != len(pair[1]):
        raise UserError(f"{path} must hold two integer arrays of one length, 'indices' and 'indices_flip'.")
    return pair


def open_codes(
    path: str | Path, *, img_size: int | None = None, tokenizer_hash: str | None = None, vocab_size: int | None = None
) -> CodeDataset:
    """Open a cache of either format and compare what is given with what it was made of.

    Args:
        img_size: crop side in pixels.
        tokenizer_hash: SHA-256 of the tokenizer's file (:func:`util.files.sha256`).
        vocab_size: V; all codes are below it. Those of single images are compared as they are read.

    Raises:
        UserError: if there is no cache, it is unfinished or damaged, or something differs.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected a cache of codes made by main_cache.py.")
    if not (path / HEADER).exists() and not (path / PARTS).exists():
        dataset: CodeDataset = NpzCodes(path)
        logger.warning("%s has no header: its tokenizer and image size cannot be checked", path)
    else:
        dataset = MappedCodes(path)
        header = dataset.header
        if img_size is not None and header.img_size != img_size:
            raise UserError(f"cache {path} was made at {header.img_size} px, not {img_size} px; make one of this size.")
        if tokenizer_hash is not None and header.tokenizer_sha256 != tokenizer_hash:
            raise UserError(
                f"cache {path} was made with another tokenizer (SHA-256 {header.tokenizer_sha256[:12]}…, yours is "
                f"{tokenizer_hash[:12]}…); give that tokenizer or make a new cache."
            )
        if vocab_size is not None and header.max_code >= vocab_size:
            raise UserError(f"cache {path} holds codes up to {header.max_code}; expected codes below {vocab_size}.")
    if vocab_size is not None:
        dataset.vocab_size = vocab_size
    return dataset
