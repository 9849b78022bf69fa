"""Bytes ↔ floats and picture grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.pictures import assert_shows, assert_text, ink, pixels_of
from util.pictures import image_grid, save_png, to_float, to_uint8


def test_every_byte_survives_the_way_to_float_and_back() -> None:
    """Guards against truncation instead of rounding, which darkens every picture by half a level."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    floats = to_float(pixels)
    assert floats.shape == (1, 3, 16, 16)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), pixels)


def test_decoded_values_are_rounded_and_clipped() -> None:
    values = torch.tensor([-1.5, -1.0, -0.999, 0.003, 0.004, 1.0, 7.0]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 128, 255, 255]
    assert to_uint8(values.bfloat16())[0, 0, [0, 1, 5, 6], 2].tolist() == [0, 0, 255, 255]


def test_layouts_are_nhwc_outside_and_nchw_inside() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    floats = to_float(torch.from_numpy(np.array(image))[None])
    assert floats.shape == (1, 3, 2, 4)
    assert floats[0, :, 1, 3].tolist() == [1, -1, -1]
    assert to_uint8(floats)[0, 1, 3].tolist() == [255, 0, 0]


def test_save_png_is_lossless(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    save_png(pixels, tmp_path / "new folder" / "picture.png")
    with Image.open(tmp_path / "new folder" / "picture.png") as image:
        assert np.array_equal(np.asarray(image), pixels.numpy())


@pytest.mark.parametrize("shape", [(16, 16), (40, 20), (100, 130)])
def test_grid_shows_every_picture_whole_and_in_row_order(shape: tuple[int, int]) -> None:
    """Guards against a lost last row, overlapping cells, or smoothing that blurs tiny pictures."""
    pictures = np.random.default_rng(0).integers(0, 256, (7, *shape, 3), dtype=np.uint8)
    plain = assert_shows(image_grid(pictures, 3), pictures, columns=3)
    labels = [f"a rather long label {i}" for i in range(7)]
    shown = assert_shows(image_grid(pictures, 3, labels, row_titles=["a", "b", "c"]), pictures, columns=3)
    assert (shown.height, shown.width) == (plain.height, plain.width)
    if shape == (100, 130):
        assert (shown.height, shown.width) == shape  # large pictures stay as they are


def test_grid_writes_its_texts_where_they_belong() -> None:
    grey = np.stack([np.full((64, 64, 3), 200 + i, dtype=np.uint8) for i in range(4)])
    for texts in ({}, {"labels": ["one", "two", "six", "ten"]}, {"row_titles": ["upper", "lower"]}):
        picture = image_grid(grey, 2, **texts)
        pixels = pixels_of(picture)
        black, cells = ink(pixels, (0, 0, 0), 60), assert_shows(picture, grey, columns=2)
        if "labels" in texts:
            cells.assert_labelled()
            assert not black[:, : cells.left[0]].any()
        elif "row_titles" in texts:
            for top in cells.top:
                assert_text(pixels[top : top + 64, : cells.left[0]])
            assert not black[:, cells.left[0] :].any()
        else:
            assert not black.any()
