"""Pictures that a browser sends: limited before anything is decoded."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageOps

from util.errors import UserError

MAX_BYTES = 16 << 20
MAX_PIXELS = 40_000_000  # of a file: a small one may unpack to gigabytes
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def read_upload(path: str | Path) -> Image.Image:
    """The picture in a file, RGB, turned upright; of a moving one the first frame, on white where it is transparent.

    Raises:
        UserError: for a file that is too large, has too many pixels, or is no picture of these formats.
    """
    name, most = Path(path).name, f"pictures may have {MAX_PIXELS // 10**6} million pixels"
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise UserError(f"{name} has {size / 2**20:.1f} MiB; pictures may have {MAX_BYTES >> 20} MiB at most.")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{name} has {width}×{height} pixels; {most}.")
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except UserError:
        raise
    except Image.DecompressionBombError:  # does not say how many
        raise UserError(f"{name} has too many pixels; {most}.") from None
    except Exception:  # the kind depends on where the damage is
        raise UserError(
            f"{name} is not a readable picture; PNG, JPEG, WebP, BMP, GIF and TIFF files can be read."
        ) from None
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright).convert("RGB")
