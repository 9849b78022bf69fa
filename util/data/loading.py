"""How data sets are read: in batches by processes (training, caching), or by threads (everything else)."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from tqdm import tqdm

from util.data.codes import CodeDataset, MappedCodes
from util.data.images import ImageDataset
from util.signals import ignore_stop_signals


class Images(Protocol):
    """A map-style data set: item ``i`` is (uint8 tensor (H, H, 3), label), all of one size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


def load_batches(
    dataset: Any, batches: Iterable[list[int]], num_workers: int, device: torch.device
) -> Generator[list[Any], None, None]:
    """The items of each batch of indices, stacked, tensors on the device; read ahead by ``num_workers`` processes.

    A :class:`CodeDataset` gives codes (B, L), mirrored codes (B, L) and labels (B,), an :class:`ImageDataset` uint8
    images (B, H, W, 3) and labels (B,).

    The processes ignore stop signals, which a launcher sends to all of them: the step at hand can be finished. They end
    with the iterator, after an error too.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=whole_batch if isinstance(dataset, CodeDataset) else None,
        # A batch of mapped codes is read faster than it is handed over.
        num_workers=0 if isinstance(dataset, MappedCodes) else num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )
    iterator = iter(loader)
    try:
        for batch in iterator:
            yield [item.to(device, non_blocking=True) if isinstance(item, Tensor) else item for item in batch]
    finally:
        # Torch would end them by a signal when the program exits, and wait forever.
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


def whole_batch(batch: Any) -> Any:
    """``collate_fn`` of a :class:`CodeDataset`, whose ``__getitems__`` returns a whole batch already."""
    return batch


def image_batches(images: ImageDataset, batch_size: int) -> Iterator[Tensor]:
    """All images in order, uint8 (B, H, W, 3), one batch read ahead by threads; UserError for a broken one.

    Threads will do: decoding does not hold Python's lock.
    """
    with ThreadPoolExecutor() as pool:
        starts = range(0, len(images), batch_size)
        batches = (range(start, min(start + batch_size, len(images))) for start in starts)
        reading = ([pool.submit(images.load, index) for index in batch] for batch in batches)
        for batch, _ in itertools.pairwise(itertools.chain(reading, [[]])):  # of pairs, the second is read meanwhile
            yield torch.stack([image.result() for image in batch])


def load_all(dataset: Images, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """All images in order, uint8 (N, H, H, 3), and their labels, int64 (N,), with a progress bar.

    Args:
        threads: how many read; None for as many as suit the machine.
    """
    count = len(dataset)
    images = torch.empty((count, *dataset[0][0].shape), dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    with ThreadPoolExecutor(threads) as pool:
        items = pool.map(dataset.__getitem__, range(count))
        for i, item in enumerate(tqdm(items, total=count, desc="reading", unit="image", leave=False)):
            images[i], labels[i] = item
    return images, labels
