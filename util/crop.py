"""Image files → RGB pictures → square crops, as ADM does it (Dhariwal & Nichol, arXiv:2105.05233)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from util.errors import UserError

logger = logging.getLogger(__name__)


def center_crop_arr(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: an RGB image of any size → its centre, ``size``×``size`` pixels.

    The picture is halved by a box filter while its short side is at least ``2 * size``, resized bicubically until the
    short side is ``size``, and cut. Byte for byte the published one, which the reference statistics were made with.
    UserError when ``size`` is not positive.
    """
    if size < 1:
        raise UserError(f"Crop size {size} must be at least 1 pixel.")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_rgb(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read any image file as an 8-bit RGB picture, decoded completely, just as ADM's loader does.

    Grey, palette and CMYK pictures become RGB by Pillow's conversion, which drops an alpha channel and clips 16-bit
    grey at 255 (with a warning: such files should be scaled beforehand). A rotation noted in EXIF is not applied. Of an
    animation the first frame is taken.

    Args:
        name: what messages call a ``source`` that is not a path.

    Raises:
        UserError: naming the image, when it is missing, damaged, not an image, or has floating-point pixels.
    """
    name = repr(str(source)) if name is None else name
    try:
        with Image.open(source) as image:
            image.load()
    except UnidentifiedImageError:
        raise UserError(f"Image file {name} can't be read: it is damaged or not an image.") from None
    # Decoders fail on damaged bytes in many ways: OSError, SyntaxError, struct.error, DecompressionBombError, ...
    except Exception as error:
        raise UserError(f"Image file {name} can't be read: {error}.") from error
    if image.mode == "F":
        raise UserError(f"Image file {name} has floating-point pixels; 8-bit images can be used.")
    if image.mode.startswith("I"):
        logger.warning("image file %s has 16-bit pixels: what is above 255 becomes white", name)
    return image.convert("RGB")
