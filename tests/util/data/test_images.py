"""Images from image archives and torchvision's CIFAR-10: the same as from a folder, damage named in one sentence."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.cache import CacheConfig, build_cache
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import save_tokenizer
from util.data.codes import open_codes
from util.data.images import CIFAR10_FOLDER, ImageFolder, open_images, write_image_archive
from util.dist import Dist
from util.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), dtype=np.uint8)
LABELS, SPLIT, CLASSES = [1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0], ["cat", "dog"]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "photos.npz"
    write_image_archive(path, map(png, PIXELS), LABELS, CLASSES, SPLIT)
    return path


def change(path: Path, **arrays: Any) -> None:
    """Write the file again with other arrays; None leaves one out."""
    with np.load(path) as file:
        contents = dict(file) | arrays
    np.savez(path, **{name: array for name, array in contents.items() if array is not None})


def test_an_image_archive_gives_what_a_folder_of_its_files_gives(archive: Path, tmp_path: Path) -> None:
    """Guards against shifted offsets, labels of other images, and another crop."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in np.flatnonzero(np.array(LABELS) == label):
            (tmp_path / "folder" / name / f"{i}.png").write_bytes(png(PIXELS[i]))
    folder, images = open_images(tmp_path / "folder", 8), open_images(archive, 8)
    assert (images.classes, images.labels.tolist(), len(images)) == (CLASSES, LABELS, 6)
    by_label = sorted(range(6), key=LABELS.__getitem__)
    for mine, theirs in enumerate(by_label):
        assert folder[mine][1] == images[theirs][1]
        assert np.array_equal(folder.load(mine), images.load(theirs))


def test_a_split_is_chosen_behind_a_colon(archive: Path) -> None:
    """Guards against training on test photos."""
    train, test = open_images(f"{archive}:train", 8), open_images(f"{archive}:test", 8)
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 1, 0], [1, 0])
    assert np.array_equal(test.load(1), open_images(archive, 8).load(4))
    assert len({images.fingerprint() for images in (train, test, open_images(archive, 8))}) == 3
    assert open_images(f"{archive}:train", 8).fingerprint() == train.fingerprint()
    with pytest.raises(UserError, match=r"'valid'; the splits are train and test"):
        open_images(f"{archive}:valid", 8)
    with pytest.raises(UserError, match="is not an image archive"):
        open_images(f"{archive.parent}:train", 8)


def test_readers_reach_loader_processes(archive: Path) -> None:
    copy = pickle.loads(pickle.dumps(open_images(archive, 8)))  # noqa: S301 - what a DataLoader does
    assert np.array_equal(copy.load(2), open_images(archive, 8).load(2))


def test_a_broken_archived_image_is_named_or_replaced(archive: Path) -> None:
    with np.load(archive) as file:
        data = file["data"].copy()
        data[file["offsets"][1] : file["offsets"][2]] = 0
    change(archive, data=data)
    with pytest.raises(UserError, match=r"photos\.npz, image 1 can't be read"):
        open_images(archive, 8)[1]
    image, label = open_images(archive, 8, skip_broken=True)[1]
    assert label == LABELS[2]
    assert np.array_equal(image, open_images(archive, 8).load(2))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-900]), "damaged or not an image archive"),
        (lambda path: path.write_bytes(b"no archive"), "damaged or not an image archive"),
        (lambda path: path.unlink(), "does not exist|is not a folder"),
        (lambda path: change(path, labels=None), "no array 'labels'"),
        (lambda path: change(path, offsets=np.arange(6)), "6 labels and 6 offsets"),
        (lambda path: change(path, offsets=np.arange(7)), "do not cut its"),
        (lambda path: change(path, split=np.zeros(5, int)), "6 labels"),
        (lambda path: change(path, labels=np.full(6, 2)), "labels outside its 2 classes"),
        (lambda path: change(path, labels=np.zeros(6)), "array 'labels'.*type"),
        (lambda path: change(path, data=np.zeros(10, np.uint16)), "array 'data'.*type"),
        (lambda path: change(path, classes=np.array([{}, {}], object)), "damaged or not an image archive"),
    ],
)
def test_damaged_archives_are_refused(archive: Path, damage: Callable[[Path], None], sentence: str) -> None:
    """Guards against a traceback, wrong labels, and code that a pickled array could run."""
    damage(archive)
    with pytest.raises(UserError, match=sentence):
        open_images(archive, 8)


def test_a_missing_split_is_named(archive: Path) -> None:
    change(archive, split=np.zeros(6, int))
    with pytest.raises(UserError, match="has no test images"):
        open_images(f"{archive}:test", 8)
    change(archive, split=None)
    assert len(open_images(archive, 8)) == 6
    with pytest.raises(UserError, match="no array 'split'"):
        open_images(f"{archive}:train", 8)


def test_cifar10_is_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a changed order of the data, and against files that torchvision has not checked."""
    import torchvision.datasets

    class Known:
        classes = CLASSES

        def __init__(self, root: Path, train: bool) -> None:
            assert root == tmp_path
            self.data, self.targets = (PIXELS[:4], LABELS[:4]) if train else (PIXELS[4:], LABELS[4:])

    (tmp_path / CIFAR10_FOLDER).mkdir()
    with pytest.raises(UserError, match="not torchvision's CIFAR-10"):
        open_images(tmp_path / CIFAR10_FOLDER, 8)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Known)
    train, test = (open_images(f"{tmp_path / CIFAR10_FOLDER}:{split}", 8) for split in ("train", "test"))
    assert (train.labels.tolist(), test.labels.tolist()) == (LABELS[:4], LABELS[4:])
    assert np.array_equal(np.asarray(test.read(0)), PIXELS[4])
    assert train.fingerprint() != test.fingerprint()


def test_images_without_class_folders(tmp_path: Path) -> None:
    """Generated images lie in one folder; photos for statistics in any tree."""
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(png(PIXELS[0]))
    flat = open_images(tmp_path / "flat", 8, labelled=False)
    assert (flat.classes, flat.labels.tolist()) == ([""], [0])
    (tmp_path / "tree" / "b" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "a").mkdir()
    for name in ("b/deep/1.png", "a/2.png", "a/.hidden.png"):
        (tmp_path / "tree" / name).write_bytes(png(PIXELS[0]))
    tree = open_images(tmp_path / "tree", 8, labelled=False)
    assert (tree.classes, tree.labels.tolist()) == (["a", "b"], [0, 1])
    with pytest.raises(UserError, match="holds no images"):
        ImageFolder(tmp_path / "tree" / "none", 8, labelled=False)


def test_codes_are_cached_from_an_image_archive(archive: Path, tmp_path: Path) -> None:
    """Guards against a cache that mixes splits, or is continued with other photos of the same number."""
    import torch

    save_tokenizer(tiny_tokenizer(2, 16), tmp_path / "vq.pt")
    alone = Dist(0, 1, torch.device("cpu"))
    config = CacheConfig(
        tmp_path / "vq.pt", tmp_path / "codes", data_path=f"{archive}:train", img_size=8, num_workers=0
    )
    header = build_cache(config, alone)
    assert (header.num_images, header.classes, header.grid_size) == (4, CLASSES, 4)
    assert open_codes(tmp_path / "codes").labels.tolist() == [1, 0, 1, 0]
    assert header == build_cache(config, alone)
    with pytest.raises(UserError, match="list of files"):
        build_cache(dataclasses.replace(config, data_path=str(archive)), alone)
