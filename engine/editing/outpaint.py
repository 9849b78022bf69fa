"""Outpainting: a picture grows to a canvas of any size, by windows of the model's size that overlap.

    grown = outpaint(generator, codes, 2, 1, label=3, variants=2, cfg=4.0)  # twice as wide, picture in the middle
    pictures = generator.decode_pixels(grown.codes)

Shape legend: `L` tokens of a picture of the model, `h` `w` the canvas in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.editing.edit import edit
from engine.image_generator import ImageGenerator
from util.errors import UserError

MAX_CELLS = 128 * 128  # of a canvas: its pixels are decoded at once


@dataclass(frozen=True)
class Canvas:
    """What outpainting made.

    Attributes:
        codes: int64 (variants, h, w).
        hole: bool (h, w), False where the picture was.
        windows: (top, left) of each in tokens, in the order of their turns.
    """

    codes: Tensor
    hole: np.ndarray
    windows: tuple[tuple[int, int], ...]


def outpaint(
    generator: ImageGenerator,
    codes: Tensor,
    columns: float,
    rows: float,
    label: int | None,
    *,
    variants: int = 1,
    seed: int = 0,
    **settings: Any,
) -> Canvas:
    """Variants of a canvas with the picture in its middle.

    Each window moves half its side on from what is known, so that at least about half of its cells are known when its
    turn comes, and the others are generated as :func:`engine.editing.edit.edit` does.

    Args:
        codes: int64 (L,), the picture's, unchanged in the result.
        columns, rows: size of the canvas in pictures, 1 or more each, rounded to whole tokens.
        label: class of what is generated; None: without class (then `cfg` must be 1).
        variants: how many; each follows from the seed and its number, whatever the others.
        settings: of :func:`engine.editing.edit.edit`.

    Raises:
        UserError: for a canvas that is smaller than the picture, or larger than 128 × 128 tokens.
    """
    grid = generator.model.config.grid_size
    shape = _canvas_shape(grid, columns, rows)
    top, left = ((side - grid) // 2 for side in shape)
    canvas = torch.zeros(variants, *shape, dtype=torch.int64)
    known = np.zeros(shape, bool)
    canvas[:, top : top + grid, left : left + grid] = codes.view(grid, grid)
    known[top : top + grid, left : left + grid] = True
    outside, turns = ~known, []
    for turn, (row, column) in enumerate(_windows(known, grid)):
        window = slice(row, row + grid), slice(column, column + grid)
        hole = ~known[window]
        first = turn << 32  # with the same numbers windows would repeat each other
        numbers = range(first, first + variants)
        parts = canvas[(slice(None), *window)]
        edited = edit(
            generator, parts.flatten(1), hole, label, variants=variants, seed=seed, numbers=numbers, **settings
        )
        parts[...] = edited.codes.view_as(parts)
        known[window] = True
        turns.append((row, column))
    return Canvas(canvas, outside, tuple(turns))


def _canvas_shape(grid: int, columns: float, rows: float) -> tuple[int, int]:
    named = f"the canvas is {columns:g}×{rows:g} pictures"
    if not (columns >= 1 and rows >= 1):
        raise UserError(f"{named}; it must be at least one each way.")
    if not (columns * grid) * (rows * grid) <= MAX_CELLS:
        raise UserError(f"{named} of {grid}×{grid} tokens; that is more than {MAX_CELLS} tokens.")
    return round(rows * grid), round(columns * grid)


def _windows(known: np.ndarray, grid: int) -> Iterator[tuple[int, int]]:
    """Windows until everything is known, each the one with the most known cells among those that lack some.

    They lie half a side apart, counted from the picture in the middle, and within the canvas. `known` is looked at
    anew for each.
    """
    tops, lefts = (_places(side, grid) for side in known.shape)
    while not known.all():
        counts = {(top, left): int(known[top : top + grid, left : left + grid].sum()) for top in tops for left in lefts}
        yield max((place for place, count in counts.items() if count < grid**2), key=lambda place: counts[place])


def _places(side: int, grid: int) -> list[int]:
    """First cells of the windows along one side of a canvas, half a window apart or less."""
    step, middle = max(1, grid // 2), (side - grid) // 2
    before = range(middle, 0, -step)
    after = range(middle, side - grid, step)
    return sorted({0, *before, *after, side - grid})
