"""Which part of a picture is generated anew: a hole, bool (h, w) over the token grid, True where cells are generated.

A hole comes from a mask in the coordinates of the picture as it was given, of which the same middle is taken as of the
picture itself, or from a share of the cells that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from util.crop import center_crop_box
from util.errors import UserError

_MASKED = 128  # of 255: from here on a pixel of a mask is masked


def rectangle_mask(size: tuple[int, int], box: Sequence[float], outside: bool = False) -> Image.Image:
    """A mask (width, height) that is white within left, top, right, bottom (the last two excluded), in whole pixels.

    Args:
        outside: white without instead.

    Raises:
        UserError: for a box that is empty or not within the picture.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        given = ",".join(f"{side:g}" for side in box)
        raise UserError(
            f"box {given} must be left,top,right,bottom within the picture's {size[0]}×{size[1]} pixels, not empty."
        )
    inside = np.zeros((size[1], size[0]), bool)
    inside[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = True
    return Image.fromarray((inside != outside) * np.uint8(255))


def polygon_mask(size: tuple[int, int], points: Sequence[tuple[float, float]]) -> Image.Image:
    """A mask (width, height) that is white within these corners (x, y); UserError for fewer than three."""
    if len(points) < 3:
        raise UserError(f"a polygon needs three corners or more, got {len(points)}.")
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon(list(points), fill=255, outline=255)
    return mask


def hole_of_mask(mask: Image.Image, picture_size: tuple[int, int], img_size: int, grid_size: int) -> np.ndarray:
    """The hole (h, w) of a mask: cells with a masked pixel of the mask as it is given, of value 128 or more.

    Args:
        mask: any kind of picture, of the size (width, height) of the picture that it is for.
        img_size, grid_size: side of the model's pictures in pixels and in tokens.

    Raises:
        UserError: for a mask of another size.
    """
    if mask.size != tuple(picture_size):
        (width, height), (wide, high) = mask.size, picture_size
        raise UserError(f"the mask has {width}×{height} pixels, but the picture {wide}×{high}; they must be the same.")
    left, top, right, bottom = center_crop_box(mask.size, img_size)
    # The first pixel of each cell is the first whose middle lies in it.
    rows, columns = (
        np.ceil(np.linspace(first, last, grid_size + 1) - 0.5).astype(int)
        for first, last in ((top, bottom), (left, right))
    )
    masked = (np.asarray(mask.convert("L")) >= _MASKED)[: rows[-1], : columns[-1]]
    return np.logical_or.reduceat(np.logical_or.reduceat(masked, rows[:-1], axis=0), columns[:-1], axis=1)


def random_hole(grid_size: int, kept: float, seed: int) -> np.ndarray:
    """All cells but a random share `kept`, 0 to 1: for a variation of the whole picture."""
    num_cells = grid_size**2
    hole = np.ones(num_cells, bool)
    chosen = np.random.default_rng(seed).permutation(num_cells)
    hole[chosen[: round(_share(kept) * num_cells)]] = False
    return hole.reshape(grid_size, grid_size)


def border_hole(grid_size: int, kept: float) -> np.ndarray:
    """All cells but a square in the middle that is about the share `kept`, 0 to 1, of the picture."""
    side = round(_share(kept) ** 0.5 * grid_size)
    first = (grid_size - side) // 2
    hole = np.ones((grid_size, grid_size), bool)
    hole[first : first + side, first : first + side] = False
    return hole


def _share(kept: float) -> float:
    if not 0 <= kept <= 1:
        raise UserError(f"the share to keep is {kept}; it must be 0 to 1.")
    return kept


def enlarge(cells: np.ndarray, stride: int) -> np.ndarray:
    """Cells (h, w) as pixels (h · stride, w · stride)."""
    return cells.repeat(stride, axis=0).repeat(stride, axis=1)
