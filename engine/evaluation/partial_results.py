"""What has been finished of many images so far, on disk: a killed run is resumed by any number of processes.

Each process appends files that are whole or absent; together they say which images are done. Nothing depends on which
process made which image, so another batch size or number of processes may finish the run.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from util.errors import UserError, reading
from util.files import atomic_write, remove_temporary_files
from util.readers import load_arrays

logger = logging.getLogger(__name__)

ARRAYS = ("indices", "features", "logits", "spatial", "grid_indices", "grid_images")  # of a batch, and of a part
PART = "part of an evaluation"
SAVE_INTERVAL_S = 30.0  # the work that a kill can lose, per process


@dataclass
class BatchResult:
    """One batch of finished images; for pictures of the grid also their bytes."""

    indices: NDArray[np.int64]  # (B,) image numbers
    features: Tensor  # float32 (B, d)
    logits: Tensor  # float32 (B, K)
    spatial: Tensor  # float32 (B, s); features, logits and these have no columns where they are not needed
    grid_indices: NDArray[np.int64]  # (G,)
    grid_images: NDArray[np.uint8]  # (G, H, W, 3)
    timed_images: int  # 0 for a warm-up batch
    timed_sec: float

    def arrays(self) -> dict[str, NDArray]:
        """For :meth:`PartialResults.add`."""
        arrays = {name: torch.as_tensor(getattr(self, name)).cpu().numpy() for name in ARRAYS}
        return {"timing": np.array([[self.timed_images, self.timed_sec]]), **arrays}


@dataclass
class PartialResults:
    """The part files of one evaluation in ``folder``; each holds the ``indices`` of its images, and other arrays.

    Args:
        png_dir: where each image lies as a file as well; None where they are not kept.
        picture_name: names of those files, by the images' numbers.
        names: of the arrays of a part, all of numbers.
        per_image: those of them that have a row for each of the images.
    """

    folder: Path
    png_dir: Path | None = None
    picture_name: Callable[[int], str] = "{:06}.png".format
    names: tuple[str, ...] = (*ARRAYS, "timing")
    per_image: tuple[str, ...] = ("features", "logits", "spatial")
    _pending: list[dict[str, NDArray]] = field(default_factory=list)
    _last_save: float = field(default_factory=time.monotonic)

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("part_*.npz"))

    def done(self) -> NDArray[np.int64]:
        """Numbers of the finished images, sorted."""
        return np.sort(read_parts(self.files(), "indices")) if self.files() else np.empty(0, np.int64)

    def repair(self) -> NDArray[np.int64]:
        """Remove parts that are damaged or whose pictures are, and what is left over; the numbers that remain.

        For one process, before any of them adds something: what was removed is made again.
        """
        for folder in filter(None, (self.folder, self.png_dir)):
            remove_temporary_files(folder)
        with ThreadPoolExecutor() as pool:
            for path in self.files():
                try:
                    with reading(PART, path):
                        arrays = load_arrays(PART, path, self.names)
                        numbers = [operator.index(number) for number in arrays["indices"].tolist()]
                        if any(len(arrays[name]) != len(numbers) for name in self.per_image):
                            raise ValueError("its arrays are of different lengths")
                        if any(array.dtype.kind not in "iuf" for array in arrays.values()):
                            raise ValueError("it holds something other than numbers")
                    pictures = [] if self.png_dir is None else map(self.picture, numbers)
                    damage = next(filter(None, pool.map(_damage, pictures)), "")
                except UserError as error:
                    damage = str(error)
                if damage:
                    logger.warning("%s Its images are made again.", damage)
                    path.unlink()
        return self.done()

    def picture(self, number: int) -> Path:
        """File of an image."""
        assert self.png_dir is not None
        return self.png_dir / self.picture_name(number)

    def add(self, arrays: dict[str, NDArray]) -> None:
        """Arrays of the same names each time, which are concatenated; ``indices`` (B,) are those of finished images."""
        self._pending.append(arrays)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last_save >= SAVE_INTERVAL_S

    def save(self) -> None:
        """Write what was added since the last save as one file."""
        if self._pending:
            arrays: dict[str, Any] = {
                name: np.concatenate([added[name] for added in self._pending]) for name in self._pending[0]
            }
            # Every image is generated once, so its number makes the name unique among processes and restarts.
            with atomic_write(self.folder / f"part_{arrays['indices'][0]:08}.npz") as file:
                np.savez(file, **arrays)
            self._pending = []
        self._last_save = time.monotonic()


def read_parts(files: list[Path], name: str) -> NDArray:
    """One array of all part files, concatenated in the order of ``files``."""
    return np.concatenate([load_arrays(PART, path, (name,))[name] for path in files])


def _damage(picture: Path) -> str:
    """What is wrong with a PNG file, by its check sums; "" if nothing is."""
    try:
        with reading("picture", picture), Image.open(picture, formats=["PNG"]) as image:
            image.verify()
    except UserError as error:
        return str(error)
    return ""


def weights_summary(module: torch.nn.Module) -> list[int]:
    """One integer per tensor: the sum of its bit patterns, which any order of summation gives exactly."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = module.state_dict().values()
    return torch.stack([t.contiguous().view(views[t.element_size()]).sum() for t in tensors]).tolist()
