"""Writes the checkpoints of a run in the background, so that training waits for a copy in memory only."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from util.checkpoint import LAST, last_name, save_checkpoint, saved_step
from util.errors import DISK_FULL
from util.files import temporary_name

logger = logging.getLogger(__name__)

NEW = "checkpoint-new.pth"  # complete, about to become `checkpoint-last.pth`


class CheckpointWriter:
    """`checkpoint-last.pth`, what it was before, and `checkpoint-<epoch>.pth`.

    Whenever the program is killed, :func:`util.checkpoint.find_checkpoints` finds the state of the last finished save.

    At most one write is under way: a save waits for the one before. A write that fails (on a full disk, for example)
    is reported and leaves `checkpoint-last.pth` as it was; the next save tries again. On a full disk the states before
    it make room. Leaving the `with` block waits
    for the write under way.

    Args:
        folder: the run's; None where nothing is to be written (ranks other than 0).
        keep_last: how many of the newest states to keep, `checkpoint-last.pth` included.
        start_step: the step that the run resumes from. A `checkpoint-last.pth` of another step must be damaged, because
            the run resumes from the newest good one; it is not kept.
    """

    def __init__(self, folder: Path | None, keep_last: int, start_step: int = 0) -> None:
        self._folder, self._keep_last = folder, keep_last
        # Whether `checkpoint-last.pth` is the state that was saved last, or that the run resumed from.
        self._last_is_good = folder is not None and saved_step(folder / LAST) == start_step
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        if folder is not None:
            # Of a run that was killed; the last, links to whole checkpoints, of an earlier version.
            for leftover in (folder / NEW, (folder / NEW).with_suffix(".json"), *folder.glob(".checkpoint-*.pth.tmp")):
                leftover.unlink(missing_ok=True)

    def save(self, payload: dict[str, Any], epoch: int | None = None) -> None:
        """Copy `payload` (which holds its `step`) to the host, and write it in the background.

        Args:
            epoch: keep the state for good, as `checkpoint-<epoch>.pth`.
        """
        if self._folder is None:
            return
        self.wait()
        copy = self._to_host(payload, ())
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # Not a daemon thread: the program must not exit in the middle of a write.
        self._thread = threading.Thread(target=self._write, args=(self._folder, copy, epoch))
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the write under way; why the state saved last is not on disk, or None if it is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._failure

    def _to_host(self, value: Any, path: tuple[Any, ...]) -> Any:
        """A copy that the next step doesn't change; it uses the memory of the previous copy."""
        if isinstance(value, dict):
            return {key: self._to_host(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._to_host(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        if path not in self._buffers:
            self._buffers[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return self._buffers[path].copy_(value, non_blocking=True)

    def _write(self, folder: Path, payload: dict[str, Any], epoch: int | None) -> None:
        try:
            try:
                save_checkpoint(folder / NEW, payload)
            except OSError as error:
                if error.errno not in DISK_FULL or not self._make_room(folder):
                    raise
                save_checkpoint(folder / NEW, payload)
            if epoch is not None:
                _name_again(folder / NEW, folder / f"checkpoint-{epoch}.pth")
            self._replace_last(folder)
        except Exception as error:
            self._failure = f"step {payload['step']} in {folder} ({error})"
            logger.error("NOT SAVED: %s; the previous checkpoint is kept, the next save tries again", self._failure)
        else:
            self._failure, self._last_is_good = None, True

    def _make_room(self, folder: Path) -> bool:
        """Give up the states before `checkpoint-last.pth`, if it is good; whether there were any."""
        previous = list(folder.glob("checkpoint-last-*.pth")) if self._last_is_good else []
        for path in previous:
            logger.warning("the disk is full: %s is deleted to make room for the next checkpoint", path)
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
        return bool(previous)

    def _replace_last(self, folder: Path) -> None:
        """Make the new checkpoint the last, which becomes the one before, and so on up to `keep_last` in total."""
        names = [folder / last_name(age) for age in range(self._keep_last)]
        if self._last_is_good:
            for newer, older in reversed(list(itertools.pairwise(names))):
                _name_again(newer, older)
        for suffix in (".pth", ".json"):
            os.replace((folder / NEW).with_suffix(suffix), (folder / LAST).with_suffix(suffix))
        age = self._keep_last
        while (surplus := folder / last_name(age)).exists():  # of a run that kept more
            surplus.unlink()
            surplus.with_suffix(".json").unlink(missing_ok=True)
            age += 1

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()


def _name_again(checkpoint: Path, name: Path) -> None:
    """Give a checkpoint, if it is there, a second name in one step; what had that name before loses it."""
    for suffix in (".pth", ".json"):
        source, target = checkpoint.with_suffix(suffix), name.with_suffix(suffix)
        if source.exists():
            temporary = temporary_name(target)
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:  # a file system without links, such as a mounted bucket
                shutil.copyfile(source, temporary)
            os.replace(temporary, target)
            temporary.unlink(missing_ok=True)  # still there if both were names of one file already
