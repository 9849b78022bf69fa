"""Files that a browser sends: pictures of every kind are read, everything else is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.app import uploads
from scripts.app.uploads import read_upload
from util.errors import UserError


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tiff"])
def test_pictures_of_every_kind(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (20, 10), (200, 30, 30)).save(tmp_path / f"red{suffix}")
    picture = read_upload(tmp_path / f"red{suffix}")
    assert (picture.size, picture.mode) == ((20, 10), "RGB")
    np.testing.assert_allclose(np.asarray(picture), np.broadcast_to([200, 30, 30], (10, 20, 3)), atol=8)


def test_pictures_are_upright_and_white_where_they_are_transparent(tmp_path: Path) -> None:
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_upload(tmp_path / "turned.jpg").size == (10, 20)
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert read_upload(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.png", "text.png", "drawing.svg", "empty.jpg"):
        with pytest.raises(UserError, match=f"{name} is not a readable picture"):
            read_upload(tmp_path / name)
    monkeypatch.setattr(uploads, "MAX_BYTES", len(whole) - 1)
    with pytest.raises(UserError, match=r"whole.png has 0.0 MiB"):
        read_upload(tmp_path / "whole.png")


def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against small files that unpack to gigabytes; PIL itself refuses to open the largest."""
    Image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"bomb.png has 9000×9000 pixels; pictures may have 40 million"):
        read_upload(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"large.png has too many pixels; pictures may have 40 million"):
        read_upload(tmp_path / "large.png")
