"""Image files → upright RGB pictures → square crops, as ADM does it (Dhariwal & Nichol, arXiv:2105.05233)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from util.errors import UserError


def center_crop_arr(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: an RGB image of any size → its centre, ``size``×``size`` pixels.

    The picture is halved by a box filter while its short side is at least ``2 * size``, resized bicubically until the
    short side is ``size``, and cut. Byte for byte the published one, which the reference statistics were made with.

    Raises:
        UserError: when ``size`` is not positive.
    """
    if size < 1:
        raise UserError(f"Crop size {size} must be at least 1 pixel.")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_rgb(path: str | Path) -> Image.Image:
    """Read any image file as an upright 8-bit RGB picture, decoded completely.

    Grey, palette and CMYK pictures become RGB as in ADM's loader, which also drops an alpha channel. Two things differ
    from it: a rotation noted in EXIF (phone photographs) is applied, and 16-bit grey is scaled to 8 bits where the
    plain conversion would clip everything above 255 to white. Of an animation the first frame is taken.

    Raises:
        UserError: naming the file, when it is missing, damaged, no image, or of a pixel type without a defined white
            (floating point, 32-bit integers beyond 16 bits).
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    # Decoders fail on damaged bytes in many ways: OSError, SyntaxError, struct.error, DecompressionBombError, ...
    except Exception as error:
        raise UserError(f"Image file {str(path)!r} can't be read: {error}.") from error
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        upright = _grey16_to_8(upright, path)
    elif upright.mode == "F":
        raise UserError(f"Image file {str(path)!r} has floating-point pixels; 8 or 16-bit images can be used.")
    return upright.convert("RGB")


def _grey16_to_8(image: Image.Image, path: str | Path) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise UserError(f"Image file {str(path)!r} has pixels outside 0..65535; 8 or 16-bit images can be used.")
    return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
