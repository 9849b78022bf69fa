"""The code cache: the tokenizer's codes of images, as training reads them.

A code cache, written by :mod:`engine.cache`, is a folder of
    ``codes.npy``, ``codes_flip.npy``   (N, L) uint16: raster codes of each cropped image and of its mirror image
    ``labels.npy``                      (N,) int64
    ``images.json``                     names of the images, a list of N strings, where they have names
    ``header.json``                     see :class:`CacheHeader`; written last, so a cache without it is unfinished
The published layout, one ``<class>/<image>.npz`` per image with ``indices`` and ``indices_flip``, is read as well.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data.images import hash_names, list_class_folders
from util.errors import UserError
from util.files import atomic_write, content_sha256, sha256, write_json
from util.readers import load_arrays, map_array, read_json

logger = logging.getLogger(__name__)

HEADER = "header.json"
VERIFIED = ".verified.json"  # sizes and times of the files whose hashes have been compared
PARTS = ".parts"  # subfolder of an unfinished cache; hidden, so that it is not taken for a class
CODES, CODES_FLIP, LABELS, NAMES = "codes.npy", "codes_flip.npy", "labels.npy", "images.json"
CACHE_FORMAT, CACHE_VERSION = "lpd-codes", 1

CodeBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """What a code cache was made of; ``header.json`` holds these fields."""

    img_size: int  # side of the crop, pixels
    grid_size: int  # side of the code grid; L = grid_size²
    num_images: int = 0  # N
    classes: list[str]  # names, by label
    tokenizer_sha256: str  # of the tokenizer's file
    vocab_size: int  # the tokenizer's codebook size
    max_code: int = 0
    crop: str = "adm_center"
    source: str  # path of the images, or of the cache that was converted
    source_sha256: str = ""  # of the list of images: ImageDataset.fingerprint, or the relative paths of that cache
    skipped: list[str] = dataclasses.field(default_factory=list)  # broken images that were left out, with the reason
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # name → SHA-256
    format: str = CACHE_FORMAT
    version: int = CACHE_VERSION

    # Of all of this, itself left out, as it is on disk; caches of earlier versions have none.
    header_sha256: str = dataclasses.field(default="", compare=False)

    def write(self, path: Path) -> None:
        values = dataclasses.asdict(self)
        write_json(path, values | {"header_sha256": content_sha256(values, "header_sha256")})

    @staticmethod
    def read(path: Path) -> CacheHeader:
        """Read a ``header.json``; UserError if it is missing, so that the cache is unfinished, damaged, or another."""
        if not path.exists():
            raise UserError(f"{path.parent} is an unfinished cache; run main_cache.py again to finish it.")
        values = read_json("cache header", path)
        kinds = {"int": int, "str": str, "list[str]": list, "dict[str, str]": dict}
        with contextlib.suppress(TypeError):
            header = CacheHeader(**values)
            right = all(type(getattr(header, f.name)) is kinds[str(f.type)] for f in dataclasses.fields(header))
            if right and (header.format, header.version) == (CACHE_FORMAT, CACHE_VERSION):
                if header.header_sha256 not in ("", content_sha256(values, "header_sha256")):
                    raise UserError(f"{path} is damaged or has been changed: its SHA-256 differs; cache again.")
                return header
        raise UserError(f"{path} is not the header of a code cache of version {CACHE_VERSION}.")


def write_codes(
    cache: Path,
    codes: np.ndarray,
    codes_flip: np.ndarray,
    labels: np.ndarray,
    header: CacheHeader,
    names: list[str] | None = None,
) -> CacheHeader:
    """Write the files of a code cache, the header last; ``num_images``, ``max_code`` and ``files`` follow from them.

    Args:
        codes, codes_flip: (N, L) uint16.
        labels: (N,) int64.
        names: of the images, by which a cache that grows knows them again.

    Returns:
        The header as it was written.
    """
    arrays = {CODES: codes, CODES_FLIP: codes_flip, LABELS: labels}
    for name, array in arrays.items():
        with atomic_write(cache / name) as file:
            np.save(file, array)
    if names is not None:
        write_json(cache / NAMES, names)
    header = dataclasses.replace(
        header,
        num_images=len(labels),
        max_code=int(max(codes.max(), codes_flip.max())),
        files={name: sha256(cache / name) for name in [*arrays, *([] if names is None else [NAMES])]},
    )
    header.write(cache / HEADER)
    return header


def verify_files(cache: Path, *, again: bool = False, remember: bool = True) -> CacheHeader:
    """Compare the files of a finished code cache with the hashes in its header.

    Files that had the right hash before and have the same size and time are not read again; the cache remembers them.

    Args:
        again: read them in any case.
        remember: whether to write down what was found.

    Raises:
        UserError: if a file is missing or differs.
    """
    header = CacheHeader.read(cache / HEADER)
    known: Any = None
    if not again and (cache / VERIFIED).is_file():
        with contextlib.suppress(UserError):
            known = read_json("record", cache / VERIFIED)
    found = {}
    for name, expected in header.files.items():
        path = cache / name
        status = path.stat() if path.is_file() else None
        found[name] = status and [status.st_size, status.st_mtime_ns, expected]
        remembered = isinstance(known, dict) and known.get(name) == found[name]
        if status is None or not (remembered or sha256(path) == expected):
            raise UserError(f"{path} is missing or damaged; delete {cache} and cache again.")
    if remember and known != found:
        with contextlib.suppress(OSError):  # a cache that can only be read
            write_json(cache / VERIFIED, found)
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
    def _read(self, indices: np.ndarray) -> Iterable[np.ndarray]:
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
    """A code cache: rows of memory-mapped files, so that opening it reads only the header."""

    def __init__(self, path: Path) -> None:
        self.header: CacheHeader = CacheHeader.read(path / HEADER)
        count, num_tokens = self.header.num_images, self.header.grid_size**2
        labels = map_array("cache file", path / LABELS, (count,), np.int64)
        if count and not (labels.min() >= 0 and labels.max() < len(self.header.classes)):
            raise UserError(
                f"{path / LABELS} holds labels outside the {len(self.header.classes)} classes of the cache."
            )
        super().__init__(path, self.header.classes, labels, num_tokens)
        self.vocab_size = self.header.vocab_size
        shape = (count, num_tokens)
        self._codes = [map_array("cache file", path / name, shape, np.uint16) for name in (CODES, CODES_FLIP)]

    def _read(self, indices: np.ndarray) -> Iterable[np.ndarray]:
        return (codes[indices] for codes in self._codes)


class NpzCodes(CodeDataset):
    """The published layout: ``<class>/<image>.npz`` with ``indices`` and ``indices_flip``."""

    def __init__(self, path: Path) -> None:
        classes, self.paths, labels = list_class_folders(path, {".npz"}, "code files")
        super().__init__(path, classes, labels, _load_npz(path / self.paths[0]).shape[1])

    def _read(self, indices: np.ndarray) -> Iterable[np.ndarray]:
        codes = np.empty((2, len(indices), self.num_tokens), dtype=np.int64)
        for row, index in enumerate(indices):
            file = self.path / self.paths[index]
            pair = _load_npz(file)
            if pair.shape[1] != self.num_tokens:
                raise UserError(f"{file} holds {pair.shape[1]} codes, other files {self.num_tokens}.")
            codes[:, row] = pair
        return codes

    def load(self, index: int) -> torch.Tensor:
        """Plain and mirrored codes of image ``index``, int64 (2, L)."""
        return torch.stack(self[index][:2])

    def fingerprint(self) -> str:
        """Of the sorted list of relative paths."""
        return hash_names(self.paths)


def _load_npz(path: Path) -> np.ndarray:
    """``indices`` and ``indices_flip``, int64 (2, L)."""
    pair = [array.reshape(-1) for array in load_arrays("file of codes", path, ("indices", "indices_flip")).values()]
    if any(array.dtype.kind not in "iu" for array in pair) or len(pair[0]) != len(pair[1]):
        raise UserError(f"{path} must hold two integer arrays of one length, 'indices' and 'indices_flip'.")
    return np.array(pair, dtype=np.int64)


def open_codes(path: str | Path, *, img_size: int | None = None, tokenizer_hash: str | None = None) -> CodeDataset:
    """Open a cache of either format and compare what is given with what it was made of.

    Args:
        img_size: crop side in pixels.
        tokenizer_hash: SHA-256 of the tokenizer's file (:func:`util.files.sha256`).

    Raises:
        UserError: if there is no cache, it is unfinished or damaged, or something differs.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected a cache of codes made by main_cache.py.")
    if not (path / HEADER).exists() and not (path / PARTS).exists():
        logger.warning("%s has no header: its tokenizer and image size cannot be checked", path)
        return NpzCodes(path)
    dataset = MappedCodes(path)
    header = dataset.header
    if img_size is not None and header.img_size != img_size:
        raise UserError(f"cache {path} was made at {header.img_size} px, not {img_size} px; make one of this size.")
    if tokenizer_hash is not None and header.tokenizer_sha256 != tokenizer_hash:
        raise UserError(
            f"cache {path} was made with another tokenizer (SHA-256 {header.tokenizer_sha256[:12]}…, yours is "
            f"{tokenizer_hash[:12]}…); give that tokenizer or make a new cache."
        )
    return dataset
