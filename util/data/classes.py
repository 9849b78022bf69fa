"""The classes of a data set: which are taken, what they are called, what is said about them, and lists with labels.

A *list of images* is a text file with a line for each image, its path, relative to the file's folder, and its class:
    ``.csv`` ``.tsv``   separated by a comma or a tab; further columns are ignored, and a first line without an image
    ``.txt``            separated by blanks, of which the path may have some
"""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.config import setting
from util.errors import UserError, reading
from util.readers import read_json, read_text

logger = logging.getLogger(__name__)

LISTS = {".csv": ",", ".tsv": "\t", ".txt": None}  # suffix → what separates the columns
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}
_SHOWN = 5  # names in a message


@dataclass(frozen=True, kw_only=True)
class ClassChoice:
    """Which classes of a data set are taken, and what they are called."""

    classes: tuple[str, ...] | None = setting(None, "take the images of these classes only")
    class_names: Path | None = setting(
        None, "readable names of the class folders: lines such as 'n01440764 tench', a CSV, or JSON {folder: name}"
    )

    def apply(self, found: Sequence[str], source: str) -> tuple[list[int], list[str]]:
        """(labels to keep, their names) of the classes ``found`` in ``source``, which are in the order of their labels.

        Raises:
            UserError: for a class that there is not, two of the same name, or a file of names for other classes.
        """
        names = list(found)
        if self.class_names is not None:
            given = read_class_names(self.class_names)
            if not given.keys() & set(found):
                raise UserError(
                    f"{self.class_names} names none of the classes of {source} ({_some(found)}); its lines begin with "
                    f"{_some(list(given))}."
                )
            names = [given.get(name, name) for name in found]
            if nameless := [name for name in found if name not in given]:
                logger.warning("%s has no names for %s, which keep theirs", self.class_names, _some(nameless))
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise UserError(f"{self.class_names} gives several classes the same name: {_some(twice)}.")
        if self.classes is None:
            return list(range(len(names))), names
        if unknown := sorted(set(self.classes) - set(found) - set(names)):
            raise UserError(f"{source} has no classes {_some(unknown)}; it has {_some(names)}.")
        kept = [i for i, both in enumerate(zip(found, names, strict=True)) if set(both) & set(self.classes)]
        return kept, [names[i] for i in kept]


def read_class_names(path: Path) -> dict[str, str]:
    """Folder → readable name, from lines of both, separated by the first blank, comma or tab, or from a JSON object.

    Raises:
        UserError: for a file that is missing or holds something else.
    """
    what = "--class_names"
    if path.suffix == ".json":
        names = read_json(what, path)
    else:
        lines = [line.strip() for line in read_text(what, path).splitlines() if line.strip()]
        pairs = [re.split(r"[,\s]+", line, maxsplit=1) for line in lines]
        names = {pair[0]: pair[-1].strip("\"' ") for pair in pairs} if all(len(p) == 2 for p in pairs) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise UserError(
            f"--class_names {path} must have a line 'FOLDER NAME' for each class, or be JSON of such pairs."
        )
    return names


def read_image_list(path: Path, extensions: Collection[str]) -> tuple[list[str], list[str]]:
    """(paths, classes) of a list of images, as they stand in it.

    Raises:
        UserError: naming the line that is none of an image and a class, or an image that stands there twice.
    """
    what, separator = "list of images", LISTS[path.suffix]
    lines = read_text(what, path).splitlines()
    with reading(what, path):
        of_csv = csv.reader(lines, delimiter=separator or ",")
        rows = [line.rsplit(maxsplit=1) for line in lines] if separator is None else list(of_csv)
    paths, classes = [], []
    for number, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row[:2]]
        is_image = len(cells) > 0 and Path(cells[0]).suffix.lower() in extensions
        if not any(cells) or (number == 1 and len(cells) == 2 and not is_image):
            continue
        if len(cells) < 2 or not cells[1] or not is_image:
            raise UserError(
                f"line {number} of {path} is {lines[number - 1]!r}; expected an image's path and its class."
            )
        paths.append(cells[0])
        classes.append(cells[1])
    if not paths:
        raise UserError(f"{path} lists no images; expected lines with an image's path and its class.")
    if len(set(paths)) < len(paths):
        raise UserError(f"{path} lists {Counter(paths).most_common(1)[0][0]} twice.")
    return paths, classes


def tell(source: str, classes: Sequence[str], count: int, paths: Sequence[str] = ()) -> None:
    """Log what was found, and warn where that is not likely to be what was meant.

    Args:
        paths: of images in class folders, relative to the folder of these.
    """
    logger.info("%s: %d images in %d classes: %s", source, count, len(classes), _some(classes))
    if splits := [name for name in classes if name.lower() in _SPLITS]:
        logger.warning(
            "%s has classes named %s, which look like parts of a data set: name one of these folders instead",
            source, _some(splits),
        )  # fmt: skip
        return
    if len(classes) == 1:
        logger.warning(
            "%s has one class only, %s: a model of it makes pictures of one kind; expected a subfolder per class",
            source, classes[0],
        )  # fmt: skip
    direct = {path.partition("/")[0] for path in paths if path.count("/") == 1}
    below: dict[str, set[str]] = {}
    for path in paths:
        parts = path.split("/")
        if len(parts) > 2 and parts[0] not in direct:
            below.setdefault(parts[0], set()).add(parts[1])
    for name, folders in below.items():
        if len(folders) > 1:
            logger.warning(
                "%s/%s has images in its subfolders only, %s: all are of one class, %s; if these are the classes, name "
                "the folder that they lie in", source, name, _some(sorted(folders)), name,
            )  # fmt: skip
            return


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
