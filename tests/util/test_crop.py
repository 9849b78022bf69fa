"""Centre crop and image reading: bytes as published, every kind of file an upright RGB picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.commands import DATA
from util.crop import center_crop_arr
from util.data.images import load_rgb
from util.errors import UserError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("case", range(4))
def test_center_crop_matches_the_published_one_byte_for_byte(case: int) -> None:
    """Guards against another filter, rounding or offset: FID is measured against statistics of exactly these crops."""
    with np.load(DATA / "center_crop.npz") as file:
        source, expected, size = file[f"in{case}"], file[f"out{case}"], int(file["size"])
    assert np.array_equal(np.asarray(center_crop_arr(Image.fromarray(source), size)), expected)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 300), (63, 64), (128, 127), (1000, 3)])
def test_center_crop_always_has_the_size_asked_for(width: int, height: int) -> None:
    assert center_crop_arr(Image.new("RGB", (width, height)), 32).size == (32, 32)


def test_center_crop_refuses_an_empty_crop() -> None:
    with pytest.raises(UserError, match="Crop size 0"):
        center_crop_arr(Image.new("RGB", (8, 8)), 0)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(tmp_path: Path, mode: str) -> None:
    """Guards against files that are not plain RGB reaching the network with another number of channels."""
    picture = Image.fromarray(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    picture.save(path)
    loaded = load_rgb(path)
    assert (loaded.mode, loaded.size) == ("RGB", (5, 6))
    assert np.array_equal(np.asarray(loaded), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_clipped_as_by_adm_and_said(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    grey = np.array([[0, 100, 255], [256, 1000, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f"deep.{suffix}")
    loaded = np.asarray(load_rgb(tmp_path / f"deep.{suffix}"))
    assert np.array_equal(loaded, np.repeat(grey.clip(max=255)[..., None], 3, axis=2))
    assert f"deep.{suffix}" in caplog.text


def test_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    """ADM ignores it, and so do the published codes and reference statistics."""
    pixels = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise for display
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(np.asarray(load_rgb(tmp_path / "phone.png")), pixels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "gif", "bmp", "webp"])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    """Guards against a half-downloaded picture being used with a grey lower half."""
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"half\.{suffix}"):
        load_rgb(path)


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"text\.jpg"):
        load_rgb(tmp_path / "text.jpg")
    with pytest.raises(UserError, match=r"missing\.jpg"):
        load_rgb(tmp_path / "missing.jpg")


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif"):
        load_rgb(tmp_path / "float.tif")
