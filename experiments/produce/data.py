"""The photographs of the experiment, made from a public data set (M. Klasson et al., arXiv:1901.00711, MIT licence):

    git clone --depth 1 https://github.com/marcusklasson/GroceryStoreDataset
    python -m experiments.produce.data GroceryStoreDataset/dataset produce64.npz

Fruit and vegetables, 3,676 photos in 35 classes (an apple is an apple, whatever its sort), as an image archive of
64×64 pixels. The data set's own three parts, photos of three shops, are mixed and split anew: 15 % are test.
"""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.produce.scales import IMG_SIZE
from util.cli import Parser, exit_on_user_error, path_ending_in
from util.data.images import load_rgb, write_image_archive
from util.errors import UserError
from util.files import check_output_file

PARTS, KINDS = ("train", "val", "test"), ("Fruit", "Vegetables")
TEST_SHARE, SEED = 0.15, 0
JPEG = {"quality": 88, "subsampling": 0, "optimize": True}  # 0: 4:4:4


def find_photos(folder: Path) -> list[tuple[str, Path]]:
    """(class, path) of every photo ``PART/KIND/CLASS/…/NAME.jpg``, sorted by class and then by path.

    Raises:
        UserError: if there are none.
    """
    found = []
    for part in PARTS:
        for kind in KINDS:
            root = folder / part / kind
            found += [(path.relative_to(root).parts[0], path) for path in root.glob("*/**/*.jpg")]
    if not found:
        raise UserError(f"{folder} has no photos such as train/Fruit/Apple/…/*.jpg; give the folder named dataset.")
    return sorted(found, key=lambda photo: (photo[0], photo[1].relative_to(folder).as_posix()))


def small_jpeg(path: Path) -> bytes:
    """The centre square of a photo as a JPEG file of 64×64 pixels."""
    photo = load_rgb(path)
    side = min(photo.size)
    left, top = ((length - side) // 2 for length in photo.size)
    square = photo.crop((left, top, left + side, top + side))
    file = io.BytesIO()
    square.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.LANCZOS).save(file, "JPEG", **JPEG)
    return file.getvalue()


def make_archive(folder: Path, output: Path) -> None:
    """Write the image archive; UserError for a folder without photos or a broken photo."""
    photos = find_photos(folder)
    names = [name for name, _ in photos]
    classes = sorted(set(names))
    test = np.random.default_rng(SEED).random(len(photos)) < TEST_SHARE
    with ThreadPoolExecutor() as pool:
        files = list(pool.map(small_jpeg, [path for _, path in photos]))
    write_image_archive(output, files, map(classes.index, names), classes, test)
    counts = Counter(names)
    print(f"{output}: {len(photos):,} photos in {len(classes)} classes, {test.sum():,} of them test")
    print(", ".join(f"{name} {counts[name]}" for name in classes))


def main() -> None:
    parser = Parser(prog="python -m experiments.produce.data", description=__doc__)
    parser.add_argument("dataset", type=Path, help="the folder named dataset of the public data set")
    parser.add_argument("output", type=path_ending_in(".npz"), help="image archive to write, .npz")
    args = parser.parse_args()
    check_output_file(args.output)
    make_archive(args.dataset, args.output)


if __name__ == "__main__":
    exit_on_user_error(main)
