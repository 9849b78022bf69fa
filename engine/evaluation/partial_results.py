"""What has been finished of many images so far, on disk: a killed run is resumed by any number of processes.

Each process appends files that are whole or absent; together they say which images are done. Nothing depends on which
process made which image, so another batch size or number of processes may finish the run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from util.files import atomic_write

ARRAYS = ("indices", "features", "logits", "spatial", "grid_indices", "grid_images")  # of a batch, and of a part
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
    """The part files of one evaluation in ``folder``; each holds the ``indices`` of its images, and other arrays."""

    folder: Path
    _pending: list[dict[str, NDArray]] = field(default_factory=list)
    _last_save: float = field(default_factory=time.monotonic)

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("part_*.npz"))

    def done(self) -> NDArray[np.int64]:
        """Numbers of the finished images, sorted."""
        return np.sort(read_parts(self.files(), "indices")) if self.files() else np.empty(0, np.int64)

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
    arrays = []
    for path in files:
        with np.load(path) as file:
            arrays.append(file[name])
    return np.concatenate(arrays)


def weights_summary(module: torch.nn.Module) -> list[int]:
    """One integer per tensor: the sum of its bit patterns, which any order of summation gives exactly."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = module.state_dict().values()
    return torch.stack([t.contiguous().view(views[t.element_size()]).sum() for t in tensors]).tolist()
