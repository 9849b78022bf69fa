"""Bytes ↔ floats and picture grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

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


def _contains(canvas: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(canvas) == color).all(-1).sum())


def test_grid_shows_every_picture_whole_and_in_row_order() -> None:
    """Guards against a lost last row, overlapping cells, or smoothing that blurs tiny pictures."""
    colors = [(250, 10 * i, 5) for i in range(7)]
    pictures = np.stack([np.full((16, 16, 3), color, dtype=np.uint8) for color in colors])
    canvas = image_grid(pictures, 3, [f"a rather long label {i}" for i in range(7)], row_titles=["a", "b", "c"])
    centres = []
    for color in colors:
        assert _contains(canvas, color) == 64 * 64  # enlarged by a whole factor
        rows, columns = (np.asarray(canvas) == color).all(-1).nonzero()
        centres.append((round(rows.mean()), round(columns.mean())))
    assert centres == sorted(centres)
    assert len({row for row, _ in centres}) == 3


def test_grid_keeps_large_pictures_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 100, 130, 3), dtype=np.uint8)
    canvas = np.asarray(image_grid(pixels, 1))
    windows = np.lib.stride_tricks.sliding_window_view(canvas, pixels.shape[1:])
    assert any(np.array_equal(window, pixels[0]) for window in windows.reshape(-1, *pixels.shape[1:]))


def test_grid_writes_its_texts() -> None:
    blank = np.full((2, 64, 64, 3), 255, dtype=np.uint8)
    for texts in ({"labels": ["seven", "eight"]}, {"row_titles": ["row"]}):
        assert _contains(image_grid(blank, 2, **texts), (0, 0, 0)) > 0
    assert _contains(image_grid(blank, 2), (0, 0, 0)) == 0
