"""The square centre crop of ADM (Dhariwal & Nichol, arXiv:2105.05233)."""

from __future__ import annotations

import logging

from PIL import Image

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


def center_crop_box(picture_size: tuple[int, int], size: int) -> tuple[float, float, float, float]:
    """Which part of a picture (width, height) its crop shows: left, top, right, bottom, in the picture's pixels."""
    width, height = picture_size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    across, down = picture_size[0] / width, picture_size[1] / height
    return left * across, top * down, (left + size) * across, (top + size) * down
