"""Images → a code cache; also the published layout of one file per image → a code cache.

Work is cut into parts of consecutive images. A part's codes are written to a file of their own as soon as they are
made, so a killed run is resumed with the parts that are missing, by any number of processes; at the end the parts are
joined into the files described in :mod:`util.data.codes`. Batches never cross parts, so the codes do not depend on the
number of processes either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
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

from tokenizers import exact_precision, load_tokenizer, picture_size
from util.config import MAX_SIDE, MAX_WORKERS, check, setting
from util.data.codes import HEADER, PARTS, CacheHeader, NpzCodes, verify_files, write_codes
from util.data.images import ImageDataset, open_images
from util.data.loading import load_batches
from util.dist import DeviceConfig, Dist
from util.errors import UserError
from util.files import atomic_write, check_output_dir, refuse_link, sha256
from util.folder_lock import LOCK_FILE, FolderLock
from util.pictures import to_float
from util.readers import load_arrays

logger = logging.getLogger(__name__)

PART_SIZE = 256  # images; what a killed run can lose per process
MAX_VOCAB = 2**16  # codes are stored as uint16
JOB = "job.json"  # in the folder of parts: what they are made of


@dataclass(frozen=True)
class CacheConfig(DeviceConfig):
    """A code cache to make: of the images in ``data_path``, or of the published layout in ``convert_from``.

    The files in ``convert_from`` do not say what they were made with: ``vqgan_path`` and ``img_size`` must be right, of
    which only the grid and the range of codes can be checked. UserError for a setting out of its range, and unless
    there is exactly one of the two sources.
    """

    vqgan_path: Path = setting(help="tokenizer file, such as vq_ds16_c2i.pt")
    cached_path: Path = setting(help="folder of the cache: a new one, or an unfinished one to resume")
    data_path: str | None = setting(None, "images: one subfolder per class, or photos.npz:train")
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

    def __post_init__(self) -> None:
        check(self)
        if (self.data_path is None) == (self.convert_from is None):
            raise UserError("give either --data_path, images, or --convert_from, a cache with one .npz per image.")


def build_cache(config: CacheConfig, dist: Dist) -> CacheHeader:
    """Make a code cache: the codes of every image's ADM centre crop and of its mirror image.

    To be called by all processes of ``dist``, among which the images are divided. Where ``cached_path`` holds an
    unfinished cache of the same images, tokenizer and size, it is resumed; a finished one is verified and kept.

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
        size = picture_size(config.img_size, tokenizer)
        vocab_size, stride = tokenizer.config.codebook_size, tokenizer.stride
        if vocab_size > MAX_VOCAB:
            raise UserError(f"a codebook of {vocab_size} codes cannot be cached; at most {MAX_VOCAB} fit uint16.")
        source: ImageDataset | NpzCodes
        if config.data_path is not None:
            if size % stride:
                raise UserError(f"--img_size {size} must be a multiple of the tokenizer's stride, {stride}.")
            source, blank = open_images(config.data_path, size), torch.zeros(size, size, 3, dtype=torch.uint8)
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
        self.job = CacheHeader(
            img_size=size,
            grid_size=size // stride,
            classes=source.classes,
            tokenizer_sha256=sha256(config.vqgan_path),
            vocab_size=vocab_size,
            source=config.data_path or str(config.convert_from),
            source_sha256=source.fingerprint(),
        )
        starts = range(0, len(self.labels), PART_SIZE)
        self.parts = [range(start, min(start + PART_SIZE, len(self.labels))) for start in starts]

    def build(self) -> CacheHeader:
        with FolderLock(self.cache) as lock:
            self.dist.on_main(lock.acquire)
            todo = self.dist.on_main(self._prepare)
            if todo is None:
                return CacheHeader.read(self.cache / HEADER)
            self._make_parts(todo)
            return self.dist.on_main(self._join_parts)

    def _prepare(self) -> list[range] | None:
        """The parts still to be made; None if the cache is finished, in which case it has been verified."""
        cache, job_file = self.cache, self.cache / PARTS / JOB
        refuse_link(cache / PARTS)
        if (cache / HEADER).exists():
            self._require_same(cache / HEADER)
            logger.info("%s is finished; verifying its files", cache)
            header = verify_files(cache, again=True)
            if header.skipped and not self.config.skip_broken:
                logger.warning("%s was made without %d broken files, listed in %s", cache, len(header.skipped), HEADER)
            shutil.rmtree(cache / PARTS, ignore_errors=True)
            logger.info("%s is undamaged, with %d images: nothing to do", cache, header.num_images)
            return None
        if job_file.exists():
            self._require_same(job_file)
        elif any(entry.name not in (PARTS, LOCK_FILE) for entry in cache.iterdir()):
            raise UserError(f"{cache} exists and is not a cache of this format; give --cached_path a new folder.")
        else:
            self.job.write(job_file)
        todo = [part for part in self.parts if self._read_part(part) is None]
        if made := len(self.parts) - len(todo):
            logger.info("%s is unfinished: %d of %d parts are there, resuming", cache, made, len(self.parts))
        return todo

    def _require_same(self, file: Path) -> None:
        """Raise UserError unless ``file``, the header or the job found in the cache, is of the same work."""
        other = CacheHeader.read(file)
        for name, meaning in (
            ("img_size", "--img_size {}"),
            ("tokenizer_sha256", "a tokenizer file of SHA-256 {:.12}…"),
            ("source_sha256", "a list of files of SHA-256 {:.12}…"),
        ):
            theirs, mine = getattr(other, name), getattr(self.job, name)
            if theirs != mine:
                raise UserError(
                    f"{self.cache} holds a cache made from {meaning.format(theirs)}, this call has "
                    f"{meaning.format(mine)}; give another --cached_path or delete that cache."
                )

    def _make_parts(self, todo: list[range]) -> None:
        rank, world_size, size = self.dist.rank, self.dist.world_size, self.config.batch_size
        rows = [list(part[at : at + size]) for part in todo[rank::world_size] for at in range(0, len(part), size)]
        reading = load_batches(self.rows, rows, self.config.num_workers, self.dist.device)
        total, left = len(self.labels), sum(map(len, todo))
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
            with atomic_write(self._part_path(part)) as file:
                np.savez(file, codes=torch.cat(codes, 1).numpy().astype(np.uint16), reasons=np.array(reasons, np.str_))
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
        path = self._part_path(part)
        if not path.exists():
            return None
        try:
            codes, reasons = load_arrays("part", path, ("codes", "reasons")).values()
        except UserError as error:
            logger.warning("%s It is made again.", error)
            return None
        if codes.shape != (2, len(part), self.job.grid_size**2) or len(reasons) != len(part):
            logger.warning("%s holds something else and is made again", path)
            return None
        return codes, reasons

    def _join_parts(self) -> CacheHeader:
        """Write the files of the finished cache, all codes in memory (ImageNet's: 1.3 GB), and remove the parts."""
        codes = np.empty((2, len(self.labels), self.job.grid_size**2), dtype=np.uint16)
        reasons: list[str] = []
        for part in self.parts:
            content = self._read_part(part)
            if content is None:
                raise UserError(
                    f"{self._part_path(part)} is missing or damaged; --cached_path must be one folder for all "
                    "processes. Run the same command again to make what is missing."
                )
            codes[:, part.start : part.stop] = content[0]
            reasons += content[1].tolist()
        errors = [reason for reason in reasons if reason]
        self._check_broken(errors)
        labels = self.labels
        if errors:
            good = np.array(reasons) == ""
            codes, labels = codes[:, good], labels[good]
        if not len(labels):
            raise UserError(f"none of the {len(reasons)} images of {self.job.source} can be read.")
        header = write_codes(self.cache, codes[0], codes[1], labels, dataclasses.replace(self.job, skipped=errors))
        shutil.rmtree(self.cache / PARTS)
        listed = f", listed as 'skipped' in {HEADER}" if errors else ""
        logger.info("%s: %d images cached, %d broken files left out%s", self.cache, len(labels), len(errors), listed)
        return header
