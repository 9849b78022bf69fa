"""Images as training, caching and scoring read them: from a folder, a list, an archive, or torchvision's CIFAR-10.

:func:`open_images` is the one way in; what the path points at decides.

An *image folder* is ``root/<class>/…/<image>``; class folders in sorted order are labels 0, 1, 2, … A *list of images*
is described in :mod:`util.data.classes`.

An *image archive* is an ``.npz`` that holds the image files themselves, for sets of many small pictures:
    ``data``      (bytes,) uint8: all JPEG or PNG files, one after the other
    ``offsets``   (N + 1,) integers: image ``i`` is ``data[offsets[i]:offsets[i + 1]]``
    ``labels``    (N,) integers
    ``classes``   (class_num,) strings: names, by label
    ``split``     (N,) integers, may be absent: 0 training, 1 test
"""

from __future__ import annotations

import abc
import hashlib
import io
import itertools
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from util.config import MAX_SIDE
from util.crop import center_crop_arr
from util.data.classes import LISTS, ClassChoice, read_image_list, tell
from util.errors import UserError
from util.files import atomic_write
from util.readers import load_arrays

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
# What such files may hold, whatever their names; of the others Pillow knows, some run a program (Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MAX_ASPECT = 100  # longer strips would take gigabytes, enlarged until the short side is that of the crop
SPLITS = ("train", "test")  # by the number that stands for them in an image archive
NO_CLASSES = frozenset({"__MACOSX"})  # what archivers leave; hidden folders neither
CIFAR10_FOLDER = "cifar-10-batches-py"  # as torchvision unpacks it


class ImageDataset(Dataset[tuple[torch.Tensor, int]], abc.ABC):
    """Map-style data set of ADM centre crops.

    ``dataset[i]`` is ``(image, label)``: a uint8 tensor (img_size, img_size, 3), RGB, and an int.

    Args:
        source: the path it was opened by, for messages and records.
        classes: names, by label. ``labels``: int64 (N,).
        skip_broken: an image that cannot be decoded is replaced by the next one that can, with a warning, so that
            batches keep their size and item ``i`` depends on the files alone. Otherwise such an image is an error.

    Raises:
        UserError: from ``dataset[i]``, naming the image, for a broken one.
    """

    def __init__(
        self, source: str | Path, classes: list[str], labels: NDArray[np.int64], img_size: int, skip_broken: bool
    ) -> None:
        if not 1 <= img_size <= MAX_SIDE:
            raise UserError(f"images of {img_size}×{img_size} pixels can't be made; a side has 1 to {MAX_SIDE} pixels.")
        self.source = str(source)
        self.classes = classes
        self.labels = labels
        self.img_size = img_size
        self.skip_broken = skip_broken

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def read(self, index: int) -> Image.Image:
        """Image ``index`` as it is stored: RGB, of any size; raises UserError if it is broken."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 that tells this list of images from another."""

    @abc.abstractmethod
    def _take(self, rows: NDArray[np.int64]) -> None:
        """Keep only these images."""

    def choose(self, choice: ClassChoice) -> None:
        """Keep only the images of the chosen classes, under the names that are chosen for them."""
        kept, names = choice.apply(self.classes, self.source)
        rows = np.flatnonzero(np.isin(self.labels, kept))
        if len(rows) < len(self):
            self._take(rows)
            self.labels = np.searchsorted(np.array(kept, np.int64), self.labels[rows])
        self.classes = names

    def load(self, index: int) -> torch.Tensor:
        """The crop of image ``index``, uint8 (img_size, img_size, 3); raises UserError if it is broken."""
        return torch.from_numpy(np.array(center_crop_arr(self.read(index), self.img_size), dtype=np.uint8))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                return self.load(candidate), int(self.labels[candidate])
            except UserError as error:
                if not self.skip_broken:
                    raise UserError(f"{error} Repair or remove it; skip_broken leaves broken images out.") from None
                logger.warning("skipped: %s", error)
        raise UserError(f"none of the {len(self)} images of {self.source} can be read.")


class ImageFiles(ImageDataset):
    """Image files in a folder, ``root``; ``paths``, relative to it, are in the order of the images."""

    root: Path
    paths: list[str]

    def read(self, index: int) -> Image.Image:
        return load_rgb(self.root / self.paths[index])

    def fingerprint(self) -> str:
        """Of the sorted list of relative paths."""
        return hash_names(self.paths)

    def _take(self, rows: NDArray[np.int64]) -> None:
        self.paths = [self.paths[row] for row in rows]


class ImageList(ImageFiles):
    """The images of a list of images, sorted by class and path; UserError if a line or a file is amiss."""

    def __init__(self, path: str | Path, img_size: int, skip_broken: bool = False) -> None:
        self.root = Path(path).parent
        paths, names = read_image_list(Path(path), IMAGE_EXTENSIONS)
        order = sorted(range(len(paths)), key=lambda i: (names[i], paths[i]))
        self.paths = [paths[i] for i in order]
        missing = [path for path in self.paths if not (self.root / path).is_file()]
        if missing:
            raise UserError(f"{path} lists {len(missing)} files that do not exist, such as {self.root / missing[0]}.")
        classes, labels = np.unique([names[i] for i in order], return_inverse=True)
        super().__init__(path, classes.tolist(), labels, img_size, skip_broken)

    def fingerprint(self) -> str:
        """Of the paths and their labels."""
        return hash_names([f"{path}\t{label}" for path, label in zip(self.paths, self.labels, strict=True)])


class ImageFolder(ImageFiles):
    """A folder of image files, one subfolder per class.

    Args:
        labelled: if false, images may lie anywhere in ``root``. Where all of them are in subfolders, the first one of
            a path is the class; otherwise all images are of one class without a name.

    Raises:
        UserError: if ``root`` has no class folders or a class folder no images; unlabelled, if it has no images.
    """

    def __init__(self, root: str | Path, img_size: int, skip_broken: bool = False, labelled: bool = True) -> None:
        self.root = Path(root)
        if labelled:
            classes, self.paths, labels = list_class_folders(self.root, IMAGE_EXTENSIONS, "images")
        else:
            self.paths = sorted(_find_files(self.root, IMAGE_EXTENSIONS), key=lambda path: path.split("/"))
            if not self.paths:
                raise UserError(f"{root} holds no images; expected a folder with pictures, in subfolders or not.")
            names = [path.partition("/")[0] if "/" in path else "" for path in self.paths]
            found, labels = np.unique([""] * len(names) if "" in names else names, return_inverse=True)
            classes = found.tolist()
        super().__init__(root, classes, labels, img_size, skip_broken)


class ImageArchive(ImageDataset):
    """The images of an image archive, or of one split of it; UserError if it is damaged or has no such images."""

    def __init__(self, path: str | Path, img_size: int, skip_broken: bool = False, split: str | None = None) -> None:
        arrays = _read_archive(Path(path))
        numbers = np.arange(len(arrays["labels"]))
        if split is not None:
            if "split" not in arrays:
                raise UserError(f"{path} has no array 'split', so there are no {split} images to choose.")
            numbers = np.flatnonzero(arrays["split"] == SPLITS.index(split))
            if not len(numbers):
                raise UserError(f"{path} has no {split} images.")
        self.path = path
        self._numbers = numbers  # in the file, of the images of the split
        self._data, self._offsets = arrays["data"], arrays["offsets"].astype(np.int64)
        source = path if split is None else f"{path}:{split}"
        labels = arrays["labels"].astype(np.int64)[numbers]
        super().__init__(source, [str(name) for name in arrays["classes"]], labels, img_size, skip_broken)

    def read(self, index: int) -> Image.Image:
        number = int(self._numbers[index])
        file = io.BytesIO(self._data[self._offsets[number] : self._offsets[number + 1]].tobytes())
        return load_rgb(file, name=f"{self.path}, image {number}")

    def fingerprint(self) -> str:
        """Of all bytes, and of which images and labels are chosen."""
        return _hash_arrays(self._data, self._offsets, self._numbers, self.labels)

    def _take(self, rows: NDArray[np.int64]) -> None:
        self._numbers = self._numbers[rows]


class Cifar10(ImageDataset):
    """A split of CIFAR-10 (Krizhevsky, 2009) as torchvision unpacks it.

    Its loader compares all files with known MD5s; UserError if the folder is incomplete or damaged.
    """

    def __init__(self, folder: str | Path, img_size: int, skip_broken: bool = False, split: str = "train") -> None:
        from torchvision.datasets import CIFAR10  # takes seconds to import

        try:
            data = CIFAR10(Path(folder).parent, train=split == "train")
        except RuntimeError as error:
            raise UserError(f"{folder} is not torchvision's CIFAR-10, or not complete ({error}).") from None
        self._pixels: NDArray[np.uint8] = data.data
        super().__init__(f"{folder}:{split}", data.classes, np.array(data.targets, np.int64), img_size, skip_broken)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])

    def fingerprint(self) -> str:
        return _hash_arrays(self._pixels, self.labels)

    def _take(self, rows: NDArray[np.int64]) -> None:
        self._pixels = self._pixels[rows]


def open_images(
    path: str | Path,
    img_size: int,
    skip_broken: bool = False,
    *,
    labelled: bool = True,
    choice: ClassChoice | None = None,
) -> ImageDataset:
    """The images that ``path`` points at, as ``img_size`` crops; what was found is logged.

    Args:
        path: an image folder; a list of images, ``photos.csv``; an image archive, ``photos.npz``, or a split of it,
            ``photos.npz:train`` or ``:test``; or torchvision's ``cifar-10-batches-py``, likewise with a split (the
            training images without one).
        skip_broken: see :class:`ImageDataset`.
        labelled: false where classes are not needed: see :class:`ImageFolder`.
        choice: which classes are taken, and their names.

    Raises:
        UserError: if there is no such thing, or it is damaged or incomplete.
    """
    images = _open(path, img_size, skip_broken, labelled)
    if choice is not None:
        images.choose(choice)
    if labelled or len(images.classes) > 1:
        tell(images.source, images.classes, len(images), images.paths if isinstance(images, ImageFolder) else ())
    else:
        logger.info("%s: %d images", images.source, len(images))
    return images


def _open(path: str | Path, img_size: int, skip_broken: bool, labelled: bool) -> ImageDataset:
    name, split = Path(path), None
    if not name.exists():
        head, colon, tail = str(path).rpartition(":")
        if colon and (Path(head).exists() or head.endswith(".npz")):
            name, split = Path(head), tail
    if split is not None and split not in SPLITS:
        raise UserError(f"{path} asks for split {split!r}; the splits are {' and '.join(SPLITS)}.")
    if name.name == CIFAR10_FOLDER and name.is_dir():
        return Cifar10(name, img_size, skip_broken, split or "train")
    if name.suffix in LISTS and split is None:
        return ImageList(name, img_size, skip_broken)
    if name.suffix == ".npz":
        return ImageArchive(name, img_size, skip_broken, split)
    if split is not None:
        raise UserError(
            f"{path} asks for a split of {name}, which is not an image archive (.npz); name a folder for each."
        )
    return ImageFolder(name, img_size, skip_broken, labelled)


def write_image_archive(
    path: str | Path, files: Iterable[bytes], labels: Iterable[int], classes: Iterable[str], split: Iterable[int]
) -> None:
    """Write image files (JPEG, PNG …), one label and one split number (0 train, 1 test) each, as an image archive."""
    contents = list(files)
    with atomic_write(path) as file:
        np.savez(
            file,
            data=np.frombuffer(b"".join(contents), np.uint8),
            offsets=np.cumsum([0, *map(len, contents)]),
            labels=np.array(list(labels), np.int64),
            classes=np.array(list(classes), np.str_),
            split=np.array(list(split), np.uint8),
        )


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an image archive, checked."""
    arrays = load_arrays("image archive", path, ("data", "offsets", "labels", "classes"), ("split",))
    kinds = {"data": np.uint8, "offsets": np.integer, "labels": np.integer, "classes": np.str_, "split": np.integer}
    for name, kind in kinds.items():
        if name in arrays and (arrays[name].ndim != 1 or not np.issubdtype(arrays[name].dtype, kind)):
            raise UserError(f"array {name!r} of image archive {path} is not of the type it should be.")
    labels, offsets, size = arrays["labels"], arrays["offsets"].astype(np.int64), len(arrays["data"])
    count, classes = len(labels), len(arrays["classes"])
    problem = None
    if count == 0 or len(offsets) != count + 1 or len(arrays.get("split", labels)) != count:
        problem = f"has {count} labels and {len(offsets)} offsets; N images have N and N + 1"
    elif offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != size:
        problem = f"has offsets that do not cut its {size} bytes into images"
    elif labels.min() < 0 or labels.max() >= classes:
        problem = f"has labels outside its {classes} classes"
    if problem:
        raise UserError(f"image archive {path} {problem}.")
    return arrays


def _hash_arrays(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def hash_names(paths: list[str]) -> str:
    """Hex SHA-256 of a list of relative paths."""
    return hashlib.sha256("\n".join(paths).encode(errors="surrogateescape")).hexdigest()


def list_class_folders(root: Path, extensions: Collection[str], kind: str) -> tuple[list[str], list[str], np.ndarray]:
    """(class names, file paths relative to ``root``, int64 labels), all in sorted order; hidden ones are ignored."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected a folder with one subfolder of {kind} per class.")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_ignored(entry.name))
    if not classes:
        holds = next((f" but {kind}; name the folder above it" for _ in _find_files(root, extensions)), "")
        raise UserError(f"{root} has no class folders{holds}; expected one subfolder of {kind} per class.")
    files = [[f"{name}/{path}" for path in sorted(_find_files(root / name, extensions))] for name in classes]
    counts, paths = list(map(len, files)), list(itertools.chain(*files))
    if not paths:
        raise UserError(f"the class folders of {root} hold no {kind} ({', '.join(sorted(extensions))}).")
    if 0 in counts:
        empty = root / classes[counts.index(0)]
        raise UserError(f"class folder {empty} holds no {kind}; fill or remove it, labels follow the sorted folders.")
    return classes, paths, np.repeat(np.arange(len(classes), dtype=np.int64), counts)


def _is_ignored(folder: str) -> bool:
    return folder.startswith(".") or folder in NO_CLASSES


def _find_files(root: Path, extensions: Collection[str]) -> Iterator[str]:
    """Paths, relative to ``root``, of the files in it and its subfolders; hidden ones are left out.

    Links are followed, but a folder is read once: one that leads back to it, or to a folder that ``root`` lies in, is
    left out with a warning.
    """
    real = Path(os.path.realpath(root))
    above = (os.stat(folder) for folder in (real, *real.parents) if folder.exists())
    seen = {(status.st_dev, status.st_ino) for status in above}
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        links = {name for name in folders if os.path.islink(os.path.join(folder, name))}
        ordered, folders[:] = (
            sorted(itertools.filterfalse(_is_ignored, folders), key=lambda name: (name in links, name)),
            [],
        )
        for name in ordered:
            status = os.stat(os.path.join(folder, name))
            if (status.st_dev, status.st_ino) in seen:
                logger.warning("left out: %s leads to a folder that is read already", os.path.join(folder, name))
            else:
                seen.add((status.st_dev, status.st_ino))
                folders.append(name)
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                yield os.path.relpath(os.path.join(folder, name), root)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} can't be read: {error.strerror}.") from None


def load_rgb(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image file as an 8-bit RGB picture, decoded completely, just as ADM's loader does.

    Grey, palette and CMYK pictures become RGB by Pillow's conversion, which drops an alpha channel and clips 16-bit
    grey at 255 (with a warning: such files should be scaled beforehand). A rotation noted in EXIF is not applied. Of an
    animation the first frame is taken.

    Args:
        name: what messages call a ``source`` that is not a path.

    Raises:
        UserError: naming the image, when it is missing, damaged, not an image, has floating-point pixels, more than
            179 million of them (Pillow's limit), or sides whose ratio is above ``MAX_ASPECT``.
    """
    named = repr(str(source)) if name is None else name
    if isinstance(source, str | Path) and os.path.exists(source) and not os.path.isfile(source):
        raise UserError(f"Image file {named} can't be read: it is not a file.")  # reading a pipe would wait forever
    try:
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                wanted = f"one side may be up to {MAX_ASPECT} times the other"
                raise UserError(f"Image file {named} is {image.width}×{image.height} pixels; {wanted}.")
            image.load()
            if image.mode == "F":
                raise UserError(f"Image file {named} has floating-point pixels; 8-bit images can be used.")
            if image.mode.startswith("I"):
                logger.warning("image file %s has 16-bit pixels: what is above 255 becomes white", named)
            return image.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"Image file {named} can't be read: it is damaged or not an image.") from None
    # Decoders fail on damaged bytes in many ways: OSError, SyntaxError, struct.error, DecompressionBombError, ...
    except Exception as error:
        raise UserError(f"Image file {named} can't be read: {error}.") from error
