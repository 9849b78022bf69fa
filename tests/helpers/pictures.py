"""What a picture shows: the images of a grid in their cells, texts and lines where they belong."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

Picture = Image.Image | Path
Pixels = NDArray[np.uint8]


def pixels_of(picture: Picture) -> Pixels:
    """uint8 (H, W, 3)."""
    if isinstance(picture, Path):
        with Image.open(picture) as image:
            return np.array(image.convert("RGB"))
    return np.array(picture.convert("RGB"))


def ink(pixels: Pixels, colour: ArrayLike, tolerance: int = 0) -> NDArray[np.bool_]:
    """Which pixels (H, W) have a colour."""
    return (np.abs(pixels.astype(int) - np.asarray(colour, int)) <= tolerance).all(-1)


def assert_not_blank(picture: Picture, share: float = 0.01) -> None:
    """At least this share of the pixels differs from the most frequent colour."""
    pixels = pixels_of(picture).reshape(-1, 3) @ np.array([1 << 16, 1 << 8, 1])
    counts = np.unique(pixels, return_counts=True)[1]
    assert 1 - counts.max() / len(pixels) >= share, "the picture is blank"


def assert_text(pixels: Pixels) -> None:
    """Black letters on something lighter: some pixels are black, most are not."""
    assert 0.001 < ink(pixels, (0, 0, 0), 60).mean() < 0.5, "there is no text"


@dataclass(frozen=True)
class Cells:
    """Where a grid shows its images: `top` of each row, `left` of each column, and the size of a cell in pixels."""

    pixels: Pixels
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    height: int
    width: int

    def assert_labelled(self) -> None:
        """There is a text under each cell."""
        for bottom in self.top + self.height:
            for left in self.left:
                assert_text(self.pixels[bottom : bottom + 20, left : left + self.width])


def assert_shows(picture: Picture, images: ArrayLike, columns: int, smallest: int = 64) -> Cells:
    """The picture is a grid of these images, uint8 (N, H, W, 3), row by row, all whole and nothing over them.

    Args:
        smallest: images with smaller sides are shown enlarged by the least whole factor that makes them as large.
    """
    pixels, images = pixels_of(picture), np.asarray(images, dtype=np.uint8)
    factor = max(1, -(-smallest // max(images.shape[1:3])))
    places = [_places(pixels, image.repeat(factor, 0).repeat(factor, 1)) for image in images]
    for number, found in enumerate(places):
        assert len(found), f"image {number} is not in the picture"
    height, width = images.shape[1] * factor, images.shape[2] * factor
    top, left = (np.unique(np.concatenate(places)[:, axis]) for axis in (0, 1))
    assert (len(top), len(left)) == (-(-len(images) // columns), min(columns, len(images)))
    for starts, size in ((top, height), (left, width)):
        steps = np.diff(starts)
        assert (steps > size).all(), "cells overlap"
        assert len(set(steps)) <= 1, "cells are not evenly spaced"
    for number, found in enumerate(places):
        cell = top[number // columns], left[number % columns]
        assert cell in set(map(tuple, found)), f"image {number} is in another cell"
    return Cells(pixels, top, left, height, width)


def _places(pixels: Pixels, image: Pixels) -> NDArray[np.int64]:
    """(row, column) of the upper left corner wherever `pixels` hold `image`."""
    rows, columns = pixels.shape[0] - len(image) + 1, pixels.shape[1] - image.shape[1] + 1
    assert rows > 0, "the picture is smaller than the image"
    assert columns > 0, "the picture is smaller than the image"
    found = np.argwhere(ink(pixels[:rows, :columns], image[0, 0]))
    for y, x in np.random.default_rng(0).integers(image.shape[:2], size=(20, 2)):
        found = found[(pixels[found[:, 0] + y, found[:, 1] + x] == image[y, x]).all(1)]
    whole = [np.array_equal(pixels[y : y + len(image), x : x + image.shape[1]], image) for y, x in found]
    return found[np.array(whole, bool)]


def assert_mosaic(pixels: Pixels, colours: ArrayLike, tolerance: int = 2) -> tuple[slice, slice]:
    """The largest coloured field is a grid of cells (h, w) in these colours (h, w, 3); lines and texts may cross them.

    Returns:
        Rows and columns of the field.
    """
    colours = np.asarray(colours)
    h, w = colours.shape[:2]
    coloured = np.zeros(pixels.shape[:2], bool)
    for colour in np.unique(colours.reshape(-1, 3), axis=0):
        coloured |= ink(pixels, colour, tolerance)
    columns = _longest_run(np.logical_or.reduce(coloured, axis=0))
    rows = _longest_run(np.logical_or.reduce(coloured[:, columns], axis=1))
    assert rows.stop - rows.start >= 8 * h, "there is no such field"
    assert columns.stop - columns.start >= 8 * w, "there is no such field"
    y = np.linspace(rows.start, rows.stop, h + 1).round().astype(int).tolist()
    x = np.linspace(columns.start, columns.stop, w + 1).round().astype(int).tolist()
    for row, column in itertools.product(range(h), range(w)):
        inner = pixels[y[row] + 2 : y[row + 1] - 2, x[column] + 2 : x[column + 1] - 2]
        share = ink(inner, colours[row, column], tolerance).mean()
        assert share > 0.4, f"cell ({row}, {column}) does not have the colour {colours[row, column]}"
    return rows, columns


def _longest_run(mask: NDArray[np.bool_], gap: int = 5) -> slice:
    """The longest stretch of true values; up to `gap` false ones, as of a line between cells, do not end it."""
    places = np.flatnonzero(mask)
    assert len(places), "there are no such colours"
    runs = np.split(places, np.flatnonzero(np.diff(places) > gap + 1) + 1)
    longest = max(runs, key=lambda run: run[-1] - run[0])
    return slice(int(longest[0]), int(longest[-1]) + 1)


def assert_curve(pixels: Pixels, colour: ArrayLike, values: Sequence[float], x: Sequence[float] | None = None) -> None:
    """There is a line in this colour through these values, at `x`, or else at equal distances from left to right."""
    points = np.argwhere(ink(pixels, colour, 8))
    assert len(points), "there is no line in this colour"
    (top, left), (bottom, right) = points.min(0), points.max(0)
    assert right - left > pixels.shape[1] / 4, "the line is short"
    heights = (np.array(values) - min(values)) / (max(values) - min(values))
    at = np.arange(len(values)) if x is None else np.array(x)
    columns = left + 2 + (at - at[0]) / (at[-1] - at[0]) * (right - left - 4)
    for column, height in zip(columns.round(), heights, strict=True):
        here = points[np.abs(points[:, 1] - column) <= 1, 0]
        assert len(here), "the line has a gap"
        assert np.abs((bottom - here) / (bottom - top) - height).min() < 0.1, "the line runs elsewhere"
