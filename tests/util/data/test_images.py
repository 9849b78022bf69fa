"""Images from folders, image archives and torchvision's CIFAR-10: the same from each, damage named in one sentence."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from util.data.images import CIFAR10_FOLDER, ImageFolder, load_rgb, open_images, write_image_archive
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


def claim(path: Path, count: int) -> None:
    """Write the file again with a header of 'data' that claims so many bytes."""
    with np.load(path) as file:
        contents = dict(file)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count,)})
    del contents["data"]
    np.savez(path, **contents)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data.npy", header.getvalue() + bytes(10))


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
    images = open_images(archive, 8)
    loader = DataLoader(images, batch_size=None, sampler=[2], num_workers=1, multiprocessing_context="spawn")
    ((pixels, _),) = loader
    assert np.array_equal(pixels, images.load(2))


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
        (lambda path: path.write_bytes(path.read_bytes()[:-900]), "image archive .*damaged"),
        (lambda path: path.write_bytes(b"no archive"), "image archive .*damaged"),
        (lambda path: path.unlink(), "does not exist|is not a folder"),
        (lambda path: change(path, labels=None), "has no array 'labels'"),
        (lambda path: change(path, offsets=np.arange(6)), "6 labels and 6 offsets"),
        (lambda path: change(path, offsets=np.arange(7)), "do not cut its"),
        (lambda path: change(path, split=np.zeros(5, int)), "6 labels"),
        (lambda path: change(path, labels=np.full(6, 2)), "labels outside its 2 classes"),
        (lambda path: change(path, labels=np.zeros(6)), "array 'labels'.*type"),
        (lambda path: change(path, data=np.zeros(10, np.uint16)), "array 'data'.*type"),
        (lambda path: change(path, classes=np.array([{}, {}], object)), "image archive .*damaged"),
        (lambda path: claim(path, 2**40), "array of shape .1099511627776,. is claimed in"),
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


def test_images_without_class_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    (tmp_path / "tree" / "b").rename(tmp_path / "tree" / "train")
    open_images(tmp_path / "tree", 8, labelled=False)
    assert "classes named train, which look like parts of a data set" in caplog.text
    with pytest.raises(UserError, match=r"none can't be read: No such file"):
        ImageFolder(tmp_path / "tree" / "none", 8, labelled=False)


def _image(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


class TestImageFolder:
    def test_labels_follow_sorted_folders_and_files_are_found(self, tmp_path: Path) -> None:
        """Guards against labels in the file system's order, capital extensions, nested or hidden files."""
        for name in ("n02/b.JPEG", "n02/deep/er/a.png", "n01/z.webp", "n10/x.bmp"):
            _image(tmp_path / name)
        _image(tmp_path / "n01/._z.png")
        _image(tmp_path / ".cache/x.png")
        (tmp_path / "n01/notes.txt").write_text("no image")
        folder = ImageFolder(tmp_path, 8)
        assert folder.classes == ["n01", "n02", "n10"]
        assert folder.paths == ["n01/z.webp", "n02/b.JPEG", "n02/deep/er/a.png", "n10/x.bmp"]
        assert folder.labels.tolist() == [0, 1, 1, 2]

    def test_items_are_cropped_bytes(self, tmp_path: Path) -> None:
        """Guards against floats, channels first or an uncropped picture at the border of the module."""
        _image(tmp_path / "a/x.png", (1, 2, 3), size=(40, 16))
        image, label = ImageFolder(tmp_path, 8)[0]
        assert (image.dtype, image.shape, label) == (torch.uint8, (8, 8, 3), 0)
        assert image.unique(dim=0).shape[0] == 1
        assert image[0, 0].tolist() == [1, 2, 3]

    def test_broken_image_is_named_or_replaced_by_the_next(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Guards against a crash without the name, a batch that shrinks, and a replacement with a foreign label."""
        _image(tmp_path / "a/1.png", (1, 1, 1))
        (tmp_path / "a/2.png").write_bytes(b"")
        (tmp_path / "a/3.png").write_bytes(b"\x89PNG")
        _image(tmp_path / "b/4.png", (4, 4, 4))
        (tmp_path / "b/5.png").write_bytes(b"broken")
        with pytest.raises(UserError, match=r"2\.png"):
            ImageFolder(tmp_path, 8)[1]
        folder = ImageFolder(tmp_path, 8, skip_broken=True)
        found = [(int(image.float().mean()), label) for image, label in (folder[i] for i in range(5))]
        assert found == [(1, 0), (4, 1), (4, 1), (4, 1), (1, 0)]
        assert "2.png" in caplog.text

    def test_only_broken_images(self, tmp_path: Path) -> None:
        """Guards against an endless search for a readable image."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a/1.png").write_bytes(b"")
        with pytest.raises(UserError, match="none of the 1 images"):
            ImageFolder(tmp_path, 8, skip_broken=True)[0]

    def test_unfit_folders_are_named(self, tmp_path: Path) -> None:
        """Guards against labels shifted by an empty class, and an empty data set that fails late."""
        with pytest.raises(UserError, match=r"missing is not a folder"):
            ImageFolder(tmp_path / "missing", 8)
        _image(tmp_path / "flat/x.png")
        with pytest.raises(UserError, match=r"flat has no class folders"):
            ImageFolder(tmp_path / "flat", 8)
        (tmp_path / "set/a").mkdir(parents=True)
        with pytest.raises(UserError, match=r"set hold no images"):
            ImageFolder(tmp_path / "set", 8)
        _image(tmp_path / "set/b/x.png")
        with pytest.raises(UserError, match=r"set/a holds no images"):
            ImageFolder(tmp_path / "set", 8)

    def test_a_folder_that_links_lead_back_to_is_read_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Guards against 42 images where there are 2, two links that never end, and images of another class."""
        for name in ("set/a/1.png", "set/a/deep/2.png", "set/b/3.png", "elsewhere/4.png"):
            _image(tmp_path / name)
        for link, target in {"a/self": "a", "a/again": "a", "a/up": ".", "a/deep/down": "a/deep"}.items():
            (tmp_path / "set" / link).symlink_to(tmp_path / "set" / target)
        (tmp_path / "set/b/more").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "set/c").symlink_to(tmp_path / "set/b")
        folder = ImageFolder(tmp_path / "set", 8)
        assert folder.paths == ["a/1.png", "a/deep/2.png", "b/3.png", "b/more/4.png", "c/3.png", "c/more/4.png"]
        assert caplog.text.count("read already") == 4

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_folders_without_permission_are_named(self, tmp_path: Path) -> None:
        """Guards against training on what is left of a data set."""
        _image(tmp_path / "a/1.png")
        _image(tmp_path / "a/secret/2.png")
        (tmp_path / "a/secret").chmod(0)
        with pytest.raises(UserError, match=r"secret can't be read: Permission denied"):
            ImageFolder(tmp_path, 8)

    def test_what_is_no_file_is_named(self, tmp_path: Path) -> None:
        """Guards against waiting for a pipe, and against a picture that is left out silently."""
        _image(tmp_path / "a/1.png")
        os.mkfifo(tmp_path / "a/2.png")
        (tmp_path / "a/3.png").symlink_to(tmp_path / "gone.png")
        folder = ImageFolder(tmp_path, 8)
        with pytest.raises(UserError, match=r"2\.png' can't be read: it is not a file"):
            folder[1]
        with pytest.raises(UserError, match=r"3\.png' can't be read: .*No such file"):
            folder[2]


def test_pictures_that_would_take_gigabytes_are_named(tmp_path: Path) -> None:
    Image.new("1", (20000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match=r"strip\.png' is 20000×1 pixels; one side may be up to 100 times the other"):
        load_rgb(tmp_path / "strip.png")
    picture = bytearray(png(PIXELS[0]))
    picture[16:24] = (50000).to_bytes(4, "big") * 2  # its header claims 50000×50000
    (tmp_path / "bomb.png").write_bytes(picture)
    with pytest.raises(UserError, match=r"bomb\.png' can't be read"):
        load_rgb(tmp_path / "bomb.png")


def test_no_program_is_run_to_read_a_picture(tmp_path: Path) -> None:
    """Guards against PostScript under another name, which Pillow hands to Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match="damaged or not an image"):
        load_rgb(tmp_path / "a.png")
