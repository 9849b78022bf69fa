"""The ways to read images: all of them, in order, whatever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util.data.images import ImageFolder
from util.data.loading import image_batches, load_all, load_batches
from util.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "ab"[i // 4] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(path)
    return ImageFolder(tmp_path, 8)


def test_all_ways_give_the_same_images_in_order(folder: ImageFolder) -> None:
    """Guards against an image lost at the end of a batch, threads that overtake each other, and another layout."""
    wanted = torch.stack([folder.load(i) for i in range(7)])
    images, labels = load_all(folder)
    assert torch.equal(images, wanted)
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    for size in (1, 3, 7, 10):
        batches = list(image_batches(folder, size))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert torch.equal(torch.cat(batches), wanted)
    rows = [[6, 0, 3], [3, 5]]
    for workers in (0, 1):
        for (images, labels), batch in zip(load_batches(folder, rows, workers, torch.device("cpu")), rows, strict=True):
            assert torch.equal(images, wanted[batch])
            assert labels.tolist() == folder.labels[batch].tolist()


def test_a_broken_image_ends_every_way(folder: ImageFolder) -> None:
    """Guards against a picture of zeros, and against an exit that waits for the processes forever."""
    (folder.root / folder.paths[5]).write_bytes(b"")
    with pytest.raises(UserError, match=r"5\.png"):
        load_all(folder)
    with pytest.raises(UserError, match=r"5\.png"):
        list(image_batches(folder, 2))
    with pytest.raises(UserError, match=r"5\.png.*skip_broken"):
        list(load_batches(folder, [[0], [5]], 1, torch.device("cpu")))
