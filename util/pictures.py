"""Pictures at the borders of the project: bytes (uint8 NHWC or PIL) outside, float32 NCHW in [-1, 1] inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.files import atomic_write

_GAP = 4  # pixels between cells of a grid
_MIN_CELL = 64  # smaller pictures are enlarged to at least this side
_FONT_SIZE = 14


def to_uint8(images: Tensor) -> Tensor:
    """Floating point (N, 3, H, W), about [-1, 1] → uint8 (N, H, W, 3): round(clip((x + 1)/2 · 255, 0, 255))."""
    scaled = (images.float() + 1) / 2 * 255
    return scaled.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def save_png(image: Tensor | NDArray[np.uint8] | Image.Image, path: str | Path) -> None:
    """Write one picture (uint8 (H, W, 3) or PIL) as PNG, atomically."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def picture_name(number: int, class_name: str) -> str:
    """File name of a numbered picture that says its class, such as ``000012-golden_retriever.png``.

    Letters and digits of any script are kept, all else becomes an underscore, and long names are cut.
    """
    words = re.sub(r"[^\w-]+", "_", class_name).strip("_")[:40]
    return f"{number:06}-{words}.png" if words else f"{number:06}.png"


def image_grid(
    images: Tensor | NDArray[np.uint8],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    row_titles: Sequence[str] | None = None,
) -> Image.Image:
    """Lay pictures out row by row on white.

    Args:
        images: uint8 (N, H, W, 3), N ≥ 1; tiny ones are enlarged by a whole factor without smoothing.
        columns: pictures per row.
        labels: a text under each picture. Columns widen up to twice a picture's width to fit it; what is longer is cut.
        row_titles: a text left of each row.
    """
    pixels = np.asarray(images)
    rows = -(-len(pixels) // columns)
    factor = max(1, -(-_MIN_CELL // max(pixels.shape[1:3])))
    height, width = pixels.shape[1] * factor, pixels.shape[2] * factor
    font = ImageFont.load_default(_FONT_SIZE)
    line = sum(font.getmetrics()) + _GAP  # type: ignore[union-attr]
    left = max((int(font.getlength(title)) + 2 * _GAP for title in row_titles or ()), default=0)
    widest = max((int(font.getlength(text)) + 1 for text in labels or ()), default=0)
    cell = min(max(width, widest), 2 * width)
    step_x, step_y = cell + 2 * _GAP if widest else width + _GAP, height + _GAP + (line if labels else 0)
    canvas = Image.new("RGB", (left + columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for index, picture in enumerate(pixels):
        x = left + _GAP + index % columns * step_x + (cell - width) // 2
        y = _GAP + index // columns * step_y
        canvas.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if labels:
            text = labels[index]
            if font.getlength(text) > cell:
                text += "…"
            while font.getlength(text) > cell:
                text = text[:-2] + "…"
            draw.text((x + width // 2, y + height + _GAP // 2), text, fill="black", font=font, anchor="ma")
    for row, title in enumerate(row_titles or ()):
        draw.text((left - _GAP, _GAP + row * step_y + height // 2), title, fill="black", font=font, anchor="rm")
    return canvas
