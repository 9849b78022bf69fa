"""Images → a code cache; also the published layout of one file per image → a code cache.

Work is cut into parts of consecutive images. A part's codes are written to a file of their own as soon as they are
made, so a killed run is resumed with the parts that are missing, by any number of processes; at the end the parts are
joined into the files described in :mod:`util.data.codes`. Batches never cross parts, so the codes do not depend on the
number of processes either. Where images have been added since a cache was made, or begun, only theirs are made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tokenizers import exact_precision, load_tokenizer, log_quality, picture_size
from util.config import MAX_SIDE, MAX_WORKERS, check, setting
from util.config import part as config_part
from util.data.classes import ClassChoice
from util.data.codes import CODES, CODES_FLIP, HEADER, NAMES, PARTS, CacheHeader, NpzCodes, verify_files, write_codes
from util.data.images import ImageDataset, ImageFiles, open_images
from util.data.loading import load_batches
from util.dist import DeviceConfig, Dist
from util.errors import UserError
from util.files import atomic_write, check_output_dir, refuse_link, sha256
from util.folder_lock import LOCK_FILE, FolderLock
from util.pictures import to_float
from util.readers import load_arrays, read_json

logger = logging.getLogger(__name__)

PART_SIZE = 256  # images; what a killed run can lose per process
MAX_VOCAB = 2**16  # codes are stored as uint16
# In the folder of parts: what they are made of, codes of an earlier list of images, and the finished files until they
# take the place of others.
JOB, KEPT, NEW = "job.json", "kept.npz", "new"


@dataclass(frozen=True)
class CacheConfig(DeviceConfig):
    """A code cache to make: of the images in ``data_path``, or of the published layout in ``convert_from``.

    The files in ``convert_from`` do not say what they were made with: ``vqgan_path`` and ``img_size`` must be right, of
    which only the grid and the range of codes can be checked. UserError for a setting out of its range, and unless
    there is exactly one of the two sources.
    """

    vqgan_path: Path = setting(help="tokenizer file, such as vq_ds16_c2i.pt")
    cached_path: Path = setting(
        help="folder of the cache: a new one, an unfinished one to resume, or one to add images to"
    )
    data_path: str | None = setting(
        None, "images: a folder with a subfolder per class, a list photos.csv, or photos.npz[:train] (docs/training.md)"
    )
    convert_from: str | None = setting(
        None, "instead of images, a cache with one .npz per image, made with this tokenizer at this size"
    )
    img_size: int | None = setting(
        None,
        "side of the centre crop, pixels (default: of the tokenizer's training, else 256)",
        at_least=1,
        at_most=MAX_SIDE,
    )
    batch_size: int = setting(32, f"images encoded at once per process, at most {PART_SIZE}", at_least=1)
    num_workers: int = setting(4, "reading processes per process", at_least=0, at_most=MAX_WORKERS)
    skip_broken: bool = setting(False, "leave out files that cannot be read; the cache's header lists them")
    choice: ClassChoice = config_part(default_factory=ClassChoice)

    def __post_init__(self) -> None:
        check(self)
        if (self.data_path is None) == (self.convert_from is None):
            raise UserError("give either --data_path, images, or --convert_from, a cache with one .npz per image.")


def build_cache(config: CacheConfig, dist: Dist) -> CacheHeader:
    """Make a code cache: the codes of every image's ADM centre crop and of its mirror image.

    To be called by all processes of ``dist``, among which the images are divided. Where ``cached_path`` holds an
    unfinished cache of the same images, tokenizer and size, it is resumed; a finished one is verified and kept. To a
    cache of some of the images the others are added; a finished one can be read until that is done.

    Raises:
        UserError: for a broken image (unless skipped), an image size the tokenizer cannot take, a codebook of more than
            2¹⁶ codes, or a ``cached_path`` that holds something else or is written to by another process.
    """
    dist.on_main(lambda: check_output_dir(config.cached_path))
    return _Builder(config, dist).build()


class _Rows(Dataset[tuple[Tensor, str]]):
    """``load(i)`` and "", or a blank of the same shape and the reason why it cannot be loaded.

    Blanks keep the shape of a batch, so that a broken image cannot change how the others are computed.
    """

    def __init__(self, load: Callable[[int], Tensor], blank: Tensor) -> None:
        self.load, self.blank = load, blank

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.load(index), ""
        except UserError as error:
            return self.blank, str(error)


class _Builder:
    """Makes a cache; one per process.

    Row ``i`` of the cache is ``encode`` of ``rows[i]``; of B rows it makes codes (2, B, L), plain and mirrored.
    ``job`` is the header of the cache, without what is known only when the codes are made.
    """

    def __init__(self, config: CacheConfig, dist: Dist) -> None:
        self.config, self.dist, self.cache = config, dist, config.cached_path
        self.tokenizer = tokenizer = load_tokenizer(config.vqgan_path, dist.device)
        log_quality(config.vqgan_path)
        size = picture_size(config.img_size, tokenizer)
        vocab_size, stride = tokenizer.config.codebook_size, tokenizer.stride
        if vocab_size > MAX_VOCAB:
            raise UserError(f"a codebook of {vocab_size} codes cannot be cached; at most {MAX_VOCAB} fit uint16.")
        source: ImageDataset | NpzCodes
        if config.data_path is not None:
            if size % stride:
                raise UserError(f"--img_size {size} must be a multiple of the tokenizer's stride, {stride}.")
            source = open_images(config.data_path, size, choice=config.choice)
            blank = torch.zeros(size, size, 3, dtype=torch.uint8)
        else:
            source = NpzCodes(Path(str(config.convert_from)))
            grid = source.grid_size
            if size != grid * stride:
                raise UserError(
                    f"{config.convert_from} holds {grid}×{grid} codes per image, with this tokenizer those of "
                    f"{grid * stride} px images; --img_size is {size}."
                )
            source.vocab_size = vocab_size
            blank = torch.zeros(2, grid**2, dtype=torch.int64)
        self.rows, self.labels = _Rows(source.load, blank), source.labels
        self.names = source.paths if isinstance(source, ImageFiles | NpzCodes) else None
        self.job = CacheHeader(
            img_size=size,
            grid_size=size // stride,
            classes=source.classes,
            tokenizer_sha256=sha256(config.vqgan_path),
            vocab_size=vocab_size,
            source=config.data_path or str(config.convert_from),
            source_sha256=source.fingerprint(),
        )
        self.fresh = np.arange(len(self.labels))  # rows whose codes have to be made
        self.parts: list[range] = []  # of these

    def build(self) -> CacheHeader:
        with FolderLock(self.cache) as lock:
            self.dist.on_main(lock.acquire)
            plan = self.dist.on_main(self._prepare)
            if plan is None:
                return CacheHeader.read(self.cache / HEADER)
            self.fresh, todo = plan
            self.parts = _parts_of(self.fresh)
            self._make_parts(todo)
            return self.dist.on_main(self._join_parts)

    def _prepare(self) -> tuple[np.ndarray, list[range]] | None:
        """The rows to make and their parts that are not there; None if the cache is finished, and has been verified."""
        cache, header_file, job_file = self.cache, self.cache / HEADER, self.cache / PARTS / JOB
        refuse_link(cache / PARTS)
        self._commit()
        found = [CacheHeader.read(file) for file in (job_file, header_file) if file.exists()]
        for earlier in found:
            self._require_same(earlier, "img_size", "--img_size {}")
            self._require_same(earlier, "tokenizer_sha256", "a tokenizer file of SHA-256 {:.12}…")
        if header_file.exists() and found[-1].source_sha256 == self.job.source_sha256:
            self._finish(found[-1])
            return None
        if not found and any(entry.name not in (PARTS, LOCK_FILE) for entry in cache.iterdir()):
            raise UserError(f"{cache} exists and is not a cache of this format; give --cached_path a new folder.")
        if not found or found[0].source_sha256 != self.job.source_sha256 or not job_file.exists():
            self._begin(found)
        names, _ = self._kept()
        self.fresh = np.flatnonzero(~np.isin(np.array(self.names), names)) if len(names) else self.fresh
        self.parts = _parts_of(self.fresh)
        todo = [part for part in self.parts if self._read_part(part) is None]
        if made := len(self.parts) - len(todo):
            logger.info("%s is unfinished: %d of %d parts are there, resuming", cache, made, len(self.parts))
        return self.fresh, todo

    def _finish(self, header: CacheHeader) -> None:
        """Verify a finished cache; classes may have other names by now."""
        cache = self.cache
        logger.info("%s is finished; verifying its files", cache)
        verify_files(cache, again=True)
        if header.skipped and not self.config.skip_broken:
            logger.warning("%s was made without %d broken files, listed in %s", cache, len(header.skipped), HEADER)
        if header.classes != self.job.classes:
            dataclasses.replace(header, classes=self.job.classes).write(cache / HEADER)
            logger.info("%s: its classes have their new names", cache)
        shutil.rmtree(cache / PARTS, ignore_errors=True)
        logger.info("%s is undamaged, with %d images: nothing to do", cache, header.num_images)

    def _begin(self, found: list[CacheHeader]) -> None:
        """Write the job; codes that were made for an earlier one are kept where it had a part of these images."""
        parts = self.cache / PARTS
        made = [self._kept()]
        numbered = sorted(parts.glob("[0-9]*.npz"))
        for content in filter(None, map(_read, numbered)):
            if "names" not in content or self.names is None:
                self._require_same(found[0], "source_sha256", "a list of files of SHA-256 {:.12}…")
            good = content["reasons"] == ""
            made.append((content["names"][good], content["codes"][:, good]))
        if (self.cache / HEADER).exists():
            if NAMES not in found[-1].files or self.names is None:
                self._require_same(found[-1], "source_sha256", "a list of files of SHA-256 {:.12}…")
            verify_files(self.cache, again=True)
            finished = np.stack([np.load(self.cache / name) for name in (CODES, CODES_FLIP)])
            made.append((np.array(read_json("names of images", self.cache / NAMES)), finished))
        names = np.concatenate([names for names, _ in made])
        codes = np.concatenate([codes for _, codes in made], axis=1)
        names, first = np.unique(names, return_index=True)
        if len(others := np.setdiff1d(names, np.array(self.names or [""]))):
            raise UserError(
                f"{self.cache} holds codes of {len(others)} images that are not among those of {self.job.source}, such "
                f"as {others[0]}; give another --cached_path or delete that cache."
            )
        if len(names):
            logger.info("%s has the codes of %d of %d images; the others are added", self.cache, len(names),
                        len(self.labels))  # fmt: skip
            with atomic_write(parts / KEPT) as file:
                np.savez(file, names=names, codes=codes[:, first])
        for path in numbered:
            path.unlink()
        self.job.write(parts / JOB)

    def _kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Names (n,) and codes (2, n, L) of images whose codes were made for an earlier list of images."""
        content = _read(self.cache / PARTS / KEPT)
        if content is None:
            return np.array([], np.str_), np.empty((2, 0, self.job.grid_size**2), np.uint16)
        return content["names"], content["codes"]

    def _require_same(self, other: CacheHeader, name: str, meaning: str) -> None:
        """Raise UserError unless this work has the same value as ``other``, the header or the job in the cache."""
        theirs, mine = getattr(other, name), getattr(self.job, name)
        if theirs != mine:
            raise UserError(
                f"{self.cache} holds a cache made from {meaning.format(theirs)}, this call has "
                f"{meaning.format(mine)}; give another --cached_path or delete that cache."
            )

    def _make_parts(self, todo: list[range]) -> None:
        rank, world_size, size = self.dist.rank, self.dist.world_size, self.config.batch_size
        rows = [
            self.fresh[part[at : at + size]].tolist()
            for part in todo[rank::world_size]
            for at in range(0, len(part), size)
        ]
        reading = load_batches(self.rows, rows, self.config.num_workers, self.dist.device)
        total, left = len(self.fresh), sum(map(len, todo))
        bar = tqdm(total=total, initial=total - left, unit="img", desc="caching", disable=not self.dist.is_main)
        with contextlib.closing(reading) as batches, bar as progress:
            # In rounds of one part per process, after which errors and progress meet: nobody waits long for another.
            for first in range(0, len(todo), world_size):
                after = first + world_size
                mine = todo[first:after][rank : rank + 1]
                errors = [error for part in mine for error in self._make_part(part, batches, progress)]
                self._check_broken([error for found in self.dist.gather(errors) for error in found])
                progress.update(total - sum(map(len, todo[after:])) - progress.n)

    def _make_part(self, part: range, batches: Iterator[list[Any]], progress: tqdm) -> list[str]:
        """Encode and write one part; returns what was broken in it. A part that must be made again is not written."""
        codes: list[Tensor] = []
        reasons: list[str] = []
        while len(reasons) < len(part):
            batch, batch_reasons = next(batches)
            codes.append(self._encode(batch).cpu())
            reasons += batch_reasons
            progress.update(len(batch))
        errors = [reason for reason in reasons if reason]
        if self.config.skip_broken or not errors:
            content = {"codes": torch.cat(codes, 1).numpy().astype(np.uint16), "reasons": np.array(reasons, np.str_)}
            if self.names is not None:
                content["names"] = np.array([self.names[row] for row in self.fresh[part]], np.str_)
            with atomic_write(self._part_path(part)) as file:
                np.savez(file, **content)  # type: ignore[arg-type]
        return errors

    @torch.inference_mode()
    def _encode(self, batch: Tensor) -> Tensor:
        """Codes of B rows and of their mirror images, int64 (2, B, L)."""
        if self.config.data_path is None:
            return batch.transpose(0, 1)  # codes already
        x = to_float(batch)
        with exact_precision():
            return torch.stack([self.tokenizer.encode(x), self.tokenizer.encode(x.flip(-1))])

    def _check_broken(self, errors: list[str]) -> None:
        if errors and not self.config.skip_broken:
            others = f" ({len(errors) - 1} more broken files were found so far.)" if len(errors) > 1 else ""
            raise UserError(f"{errors[0]}{others} Repair or remove it; --skip_broken leaves broken files out.")

    def _part_path(self, part: range) -> Path:
        return self.cache / PARTS / f"{part.start:09d}.npz"

    def _read_part(self, part: range) -> tuple[np.ndarray, np.ndarray] | None:
        """Codes (2, n, L) uint16 and why an image is missing (n,), "" for the others; None if absent or damaged."""
        content = _read(self._part_path(part))
        if content is None:
            return None
        if content["codes"].shape != (2, len(part), self.job.grid_size**2) or len(content["reasons"]) != len(part):
            logger.warning("%s holds something else and is made again", self._part_path(part))
            return None
        return content["codes"], content["reasons"]

    def _join_parts(self) -> CacheHeader:
        """Write the files of the finished cache, all codes in memory (ImageNet's: 1.3 GB), and remove the parts."""
        codes = np.empty((2, len(self.labels), self.job.grid_size**2), dtype=np.uint16)
        names, kept = self._kept()
        if len(names):
            row_of = {name: row for row, name in enumerate(self.names or [])}
            codes[:, [row_of[name] for name in names.tolist()]] = kept
        reasons: list[str] = [""] * len(self.labels)
        for part in self.parts:
            content = self._read_part(part)
            if content is None:
                raise UserError(
                    f"{self._part_path(part)} is missing or damaged; --cached_path must be one folder for all "
                    "processes. Run the same command again to make what is missing."
                )
            codes[:, self.fresh[part]] = content[0]
            for row, reason in zip(self.fresh[part], content[1].tolist(), strict=True):
                reasons[row] = reason
        errors = [reason for reason in reasons if reason]
        self._check_broken(errors)
        good = [row for row, reason in enumerate(reasons) if not reason]
        if not good:
            raise UserError(f"none of the {len(reasons)} images of {self.job.source} can be read.")
        plain, flipped = codes[:, good] if errors else codes
        header = write_codes(
            self.cache / PARTS / NEW,
            plain,
            flipped,
            self.labels[good],
            dataclasses.replace(self.job, skipped=errors),
            None if self.names is None else [self.names[row] for row in good],
        )
        self._commit()
        listed = f", listed as 'skipped' in {HEADER}" if errors else ""
        logger.info("%s: %d images cached, %d broken files left out%s", self.cache, len(good), len(errors), listed)
        return header

    def _commit(self) -> None:
        """Put the finished files in their place; the cache counts as unfinished until the header, the last, is there.

        Where a process was killed in the middle, the next one goes on.
        """
        new = self.cache / PARTS / NEW
        if not (new / HEADER).exists():
            return
        header = CacheHeader.read(new / HEADER)
        (self.cache / HEADER).unlink(missing_ok=True)
        for name in (*header.files, HEADER):
            if (new / name).exists():
                os.replace(new / name, self.cache / name)
        shutil.rmtree(self.cache / PARTS)


def _parts_of(rows: np.ndarray) -> list[range]:
    return [range(start, min(start + PART_SIZE, len(rows))) for start in range(0, len(rows), PART_SIZE)]


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an archive, None if it is absent or damaged."""
    if not path.exists():
        return None
    try:
        return load_arrays("part", path, ("codes",), optional=("reasons", "names"))
    except UserError as error:
        logger.warning("%s It is made again.", error)
        return None
