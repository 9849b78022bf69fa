"""Batches from data sets: loading processes that end with their loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

T = TypeVar("T")


def all_batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader whose processes ignore stop signals; they end with it, after an error too.

    Torch ends them by such a signal when the program exits, and would wait for them forever.
    """
    batches = iter(loader)
    try:
        yield from batches
    finally:
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()


def whole_batch(batch: T) -> T:
    """``collate_fn`` of a :class:`CodeDataset`, whose ``__getitems__`` returns a whole batch already."""
    return batch
