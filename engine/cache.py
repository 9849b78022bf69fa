"""Images → packed cache of tokenizer codes; also the published one-file-per-image layout → packed cache.

Work is cut into parts of consecutive images. A part's codes are written to a file of their own as soon as they are
made, so a killed run continues with the parts that are missing, whatever the number of processes; at the end the parts
are joined into the files described in :mod:`util.data`. Batches never cross parts, so the codes do not depend on the
number of processes either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tokenizers import VQModel, load_tokenizer
from util.data.codes import CODES, CODES_FLIP, HEADER, LABELS, PARTS, CacheHeader, NpzCodes
from util.data.images import hash_names, open_images
from util.dist import Dist
from util.errors import UserError
from util.files import atomic_write, sha256, write_json
from util.pictures import to_float

logger = logging.getLogger(__name__)

PART_SIZE = 256  # images; what a killed run can lose per process
MAX_VOCAB = 2**16  # codes are stored as uint16
JOB = "job.json"  # in the folder of parts: what they are made of


def cache_codes(
    data_path: str | Path,
    cached_path: str | Path,
    vqgan_path: str | Path,
    img_size: int,
    dist: Dist,
    *,
    batch_size: int = 32,
    num_workers: int = 4,
    skip_broken: bool = False,
) -> CacheHeader:
    """Encode the ADM centre crop of every image in ``data_path`` and its mirror image into a packed cache.

    To be called by all processes of ``dist``; images are shared among them. Where ``cached_path`` holds an unfinished
    cache of the same images, tokenizer and size, it is continued; a finished one is verified and kept.

    Args:
        data_path: what :func:`util.data.images.open_images` takes.
        batch_size: images encoded at once by each process, at most PART_SIZE.
        num_workers: image-reading processes of each process.
        skip_broken: leave out images that cannot be decoded; the header lists them.

    Raises:
        UserError: for a broken image (unless skipped), an image size the tokenizer cannot take, a codebook of more than
            2¹⁶ codes, or a ``cached_path`` that holds something else.
    """
    tokenizer = load_tokenizer(vqgan_path, dist.device)
    if img_size < 1 or img_size % tokenizer.stride:
        raise UserError(f"--img_size {img_size} must be a multiple of the tokenizer's stride, {tokenizer.stride}.")
    images = open_images(data_path, img_size)
    job = _Job(
        img_size=img_size,
        grid_size=img_size // tokenizer.stride,
        classes=images.classes,
        tokenizer_sha256=sha256(vqgan_path),
        vocab_size=tokenizer.config.codebook_size,
        source=str(data_path),
        source_sha256=images.fingerprint(),
    )
    return _Builder(
        cache=Path(cached_path),
        job=job,
        labels=images.labels,
        rows=_GuardedRows(images.load, torch.zeros(img_size, img_size, 3, dtype=torch.uint8)),
        encode=functools.partial(_encode_both, tokenizer, dist.device),
        dist=dist,
        batch_size=batch_size,
        num_workers=num_workers,
        skip_broken=skip_broken,
    ).build()


def convert_npz(
    old_path: str | Path,
    cached_path: str | Path,
    vqgan_path: str | Path,
    img_size: int,
    dist: Dist,
    *,
    num_workers: int = 4,
    skip_broken: bool = False,
) -> CacheHeader:
    """Pack a cache of the published layout (:class:`util.data.NpzCodes`); continues and verifies like cache_codes.

    The old files do not say what they were made with: the caller vouches for ``vqgan_path`` and ``img_size``, of which
    only the grid and the range of codes can be checked.
    """
    tokenizer = load_tokenizer(vqgan_path)
    old = NpzCodes(Path(old_path))
    if img_size != old.grid_size * tokenizer.stride:
        raise UserError(
            f"{old_path} holds {old.grid_size}×{old.grid_size} codes per image, with this tokenizer those of "
            f"{old.grid_size * tokenizer.stride} px images; --img_size is {img_size}."
        )
    old.vocab_size = tokenizer.config.codebook_size
    job = _Job(
        img_size=img_size,
        grid_size=old.grid_size,
        classes=old.classes,
        tokenizer_sha256=sha256(vqgan_path),
        vocab_size=tokenizer.config.codebook_size,
        source=str(old_path),
        source_sha256=hash_names(old.paths),
    )
    return _Builder(
        cache=Path(cached_path),
        job=job,
        labels=old.labels,
        rows=_GuardedRows(functools.partial(_code_pair, old), torch.zeros(2, old.num_tokens, dtype=torch.int64)),
        encode=_swap_axes,
        dist=dist,
        batch_size=PART_SIZE,
        num_workers=num_workers,
        skip_broken=skip_broken,
    ).build()


def verify_cache(path: str | Path) -> CacheHeader:
    """Compare every file of a finished packed cache with the hash in its header; raises UserError if one differs."""
    path = Path(path)
    header = CacheHeader.read(path)
    for name, expected in header.files.items():
        if not (path / name).is_file() or sha256(path / name) != expected:
            raise UserError(f"{path / name} is missing or damaged; delete {path} and cache again.")
    return header


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a cache is made of; the fields are those of CacheHeader."""

    img_size: int
    grid_size: int
    classes: list[str]
    tokenizer_sha256: str
    vocab_size: int
    source: str
    source_sha256: str
    crop: str = "adm_center"

    def require_same(self, other: dict[str, Any], cache: Path) -> None:
        """Raise UserError unless ``other``, the fields of a job or header found in ``cache``, is the same work."""
        for name, meaning in (
            ("img_size", "--img_size {}"),
            ("tokenizer_sha256", "a tokenizer file of SHA-256 {:.12}…"),
            ("source_sha256", "a list of files of SHA-256 {:.12}…"),
        ):
            theirs, mine = meaning.format(other.get(name)), meaning.format(getattr(self, name))
            if theirs != mine:
                raise UserError(
                    f"{cache} holds a cache made from {theirs}, this call has {mine}; give another --cached_path or "
                    "delete that cache."
                )


class _GuardedRows(Dataset[tuple[Tensor, str]]):
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


def _encode_both(tokenizer: VQModel, device: torch.device, images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) → (2, B, L) int64: codes of the images and of their mirror images."""
    x = to_float(images.to(device, non_blocking=True))
    return torch.stack([tokenizer.encode(x), tokenizer.encode(x.flip(-1))])


def _code_pair(dataset: NpzCodes, index: int) -> Tensor:
    codes, codes_flip, _ = dataset[index]
    return torch.stack([codes, codes_flip])


def _swap_axes(pairs: Tensor) -> Tensor:
    return pairs.transpose(0, 1)


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes the cache whose row ``i`` is ``encode`` of ``rows[i]``; one per process.

    ``encode`` turns a batch of B rows into codes (2, B, L), plain and mirrored.
    """

    cache: Path
    job: _Job
    labels: np.ndarray
    rows: _GuardedRows
    encode: Callable[[Tensor], Tensor]
    dist: Dist
    batch_size: int
    num_workers: int
    skip_broken: bool

    def build(self) -> CacheHeader:
        if self.job.vocab_size > MAX_VOCAB:
            raise UserError(
                f"a codebook of {self.job.vocab_size} codes cannot be cached; at most {MAX_VOCAB} fit uint16."
            )
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size} must be at least 1.")
        if self.num_workers < 0:
            raise UserError(f"--num_workers {self.num_workers} must be at least 0.")
        todo = self.dist.on_main(self._prepare)
        if todo is None:
            return CacheHeader.read(self.cache)
        self._make_parts(todo)
        return self.dist.on_main(self._join_parts)

    def _parts(self) -> list[range]:
        total = len(self.labels)
        return [range(start, min(start + PART_SIZE, total)) for start in range(0, total, PART_SIZE)]

    def _prepare(self) -> list[range] | None:
        """The parts still to be made; None if the cache is finished, in which case it has been verified."""
        cache, job_file = self.cache, self.cache / PARTS / JOB
        if (cache / HEADER).exists():
            header = CacheHeader.read(cache)
            self.job.require_same(dataclasses.asdict(header), cache)
            logger.info("%s is finished, with %d images; verifying its files", cache, header.num_images)
            verify_cache(cache)
            if header.skipped and not self.skip_broken:
                logger.warning("%s was made without %d broken files, listed in %s", cache, len(header.skipped), HEADER)
            shutil.rmtree(cache / PARTS, ignore_errors=True)
            logger.info("%s is complete and undamaged: nothing to do", cache)
            return None
        if job_file.exists():
            self.job.require_same(json.loads(job_file.read_text()), cache)
        elif cache.exists() and (not cache.is_dir() or any(entry.name != PARTS for entry in cache.iterdir())):
            raise UserError(f"{cache} exists and is not a cache of this format; give --cached_path a new folder.")
        else:
            write_json(job_file, dataclasses.asdict(self.job))
        parts = self._parts()
        todo = [part for part in parts if self._read_part(part) is None]
        if len(todo) < len(parts):
            logger.info(
                "%s is unfinished: %d of %d parts are there, continuing", cache, len(parts) - len(todo), len(parts)
            )
        return todo

    def _make_parts(self, todo: list[range]) -> None:
        world_size, size = self.dist.world_size, self.batch_size
        mine = todo[self.dist.rank :: world_size]
        loader = DataLoader(
            self.rows,
            batch_sampler=[list(part[at : at + size]) for part in mine for at in range(0, len(part), size)],
            num_workers=self.num_workers if mine else 0,
            pin_memory=self.dist.device.type == "cuda",
        )
        batches = iter(loader)
        total = len(self.labels)
        progress = tqdm(
            total=total,
            initial=total - sum(map(len, todo)),
            unit="img",
            desc="caching",
            disable=not self.dist.is_main,
        )
        with progress, torch.inference_mode(), exact_precision():
            # In rounds of one part per process, after which errors and progress meet: nobody waits long for another.
            for first in range(0, len(todo), world_size):
                index = first + self.dist.rank
                made, errors = 0, []
                if index < len(todo):
                    made = len(todo[index])
                    errors = self._make_part(todo[index], batches, progress)
                everybody = self.dist.gather((made, errors))
                progress.update(sum(count for count, _ in everybody) - made)
                self._check_broken([error for _, part_errors in everybody for error in part_errors])

    def _make_part(self, part: range, batches: Iterator[tuple[Tensor, list[str]]], progress: tqdm) -> list[str]:
        """Encode and write one part; returns what was broken in it. A part that must be made again is not written."""
        codes = np.empty((2, len(part), self.job.grid_size**2), dtype=np.uint16)
        reasons: list[str] = []
        while len(reasons) < len(part):
            batch, batch_reasons = next(batches)
            start, stop = len(reasons), len(reasons) + len(batch)
            codes[:, start:stop] = self.encode(batch).cpu().numpy()
            reasons += batch_reasons
            progress.update(len(batch))
        errors = [reason for reason in reasons if reason]
        if self.skip_broken or not errors:
            with atomic_write(self._part_path(part)) as file:
                np.savez(file, codes=codes, reasons=np.array(reasons, dtype=np.str_))
        return errors

    def _check_broken(self, errors: list[str]) -> None:
        if errors and not self.skip_broken:
            others = f" (The same goes for {len(errors) - 1} more found so far.)" if len(errors) > 1 else ""
            raise UserError(f"{errors[0]}{others} Mend or remove it; --skip_broken leaves broken files out.")

    def _part_path(self, part: range) -> Path:
        return self.cache / PARTS / f"{part.start:09d}.npz"

    def _read_part(self, part: range) -> tuple[np.ndarray, np.ndarray] | None:
        """Codes (2, n, L) uint16 and why an image is missing (n,), "" for the others; None if absent or damaged."""
        path = self._part_path(part)
        try:
            with np.load(path) as file:  # checks the archive's CRC
                codes, reasons = file["codes"], file["reasons"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged (%s) and is made again", path, error)
            return None
        whole = codes.shape == (2, len(part), self.job.grid_size**2) and reasons.shape == (len(part),)
        return (codes, reasons) if whole else None

    def _join_parts(self) -> CacheHeader:
        """Write the files of the finished cache, the header last, and remove the parts."""
        contents = functools.partial(map, self._require_part, self._parts())
        errors, max_code, kept = [], 0, []
        for codes, reasons in contents():
            good = reasons == ""
            errors += reasons[~good].tolist()
            max_code = max(max_code, int(codes[:, good].max(initial=0)))
            kept.append(good)
        self._check_broken(errors)
        labels = self.labels[np.concatenate(kept)]
        if not len(labels):
            raise UserError(f"none of the {len(self.labels)} images of {self.job.source} can be read.")
        for side, name in enumerate((CODES, CODES_FLIP)):
            with atomic_write(self.cache / name) as file:
                shape = (len(labels), self.job.grid_size**2)
                np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
                for (codes, _), good in zip(contents(), kept, strict=True):
                    file.write(codes[side, good].tobytes())
        with atomic_write(self.cache / LABELS) as file:
            np.save(file, labels)
        header = CacheHeader(
            **dataclasses.asdict(self.job),
            num_images=len(labels),
            max_code=max_code,
            skipped=errors,
            files={name: sha256(self.cache / name) for name in (CODES, CODES_FLIP, LABELS)},
        )
        write_json(self.cache / HEADER, dataclasses.asdict(header))
        shutil.rmtree(self.cache / PARTS)
        for stray in self.cache.glob(".*.tmp"):  # of a run that was killed while it wrote these files
            stray.unlink()
        listed = f", listed as 'skipped' in {HEADER}" if errors else ""
        logger.info("%s: %d images cached, %d broken files left out%s", self.cache, len(labels), len(errors), listed)
        return header

    def _require_part(self, part: range) -> tuple[np.ndarray, np.ndarray]:
        content = self._read_part(part)
        if content is None:
            raise UserError(
                f"{self._part_path(part)} is missing or damaged; --cached_path must be one folder for all processes. "
                "Run the same command again to make what is missing."
            )
        return content


@contextlib.contextmanager
def exact_precision() -> Iterator[None]:
    """Float32 without TF32 or autotuning: the nearest of thousands of codes must not depend on a choice of kernels."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
