"""How a picture came about, step by step: which cells were known, which were chosen, and what had been decoded.

    generated = generator.generate(["3"], steps=16, cfg=4.0)
    trace = Trace.of(generated, 0)
    pictures = pictures_so_far(trace, generator)             # uint8 (n + 1, H, W, 3)
    save_animation("three.gif", frames(trace, pictures))    # util.animation

A code is final once it is drawn, so all of it follows from the order and the finished codes. Step 0 is the beginning,
step n the finished picture.

Shape legend: `L` tokens, `h` `w` grid, `n` steps, `H` `W` pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from engine.editing.masks import enlarge
from engine.image_generator import Generated, ImageGenerator

UNKNOWN, KNOWN, NOW = 0, 1, 2
COLOURS = {UNKNOWN: (244, 244, 244), KNOWN: (195, 200, 207), NOW: (27, 158, 119)}
_SIDE = 192  # pixels of the smallest picture in a frame
_PIXELS_AT_ONCE = 8 * 256 * 256  # decoded in one piece
_GAP, _FONT_SIZE = 8, 13


@dataclass(frozen=True)
class Trace:
    """The decoding of one picture.

    Attributes:
        codes: int64 (h, w), finished.
        steps: int (h, w), the step, 1 … n, that generated each cell; 0 for cells that were known before.
        num_steps: n; 0 where everything was known.
    """

    codes: np.ndarray
    steps: np.ndarray
    num_steps: int

    @classmethod
    def of(cls, generated: Generated, index: int) -> Trace:
        """That of picture `index` of a batch."""
        sizes, side = generated.group_sizes, round(generated.codes.shape[1] ** 0.5)
        numbers = np.arange(len(sizes)) + (0 if generated.known else 1)
        steps = np.empty(side**2, int)
        steps[generated.orders[index]] = np.repeat(numbers, sizes)
        return cls(generated.codes[index].numpy().reshape(side, side), steps.reshape(side, side), int(numbers[-1]))

    def states(self, step: int) -> np.ndarray:
        """What each cell is at `step`, 0 … n: uint8 (h, w) of UNKNOWN, KNOWN before the step, and NOW chosen."""
        states = np.where(self.steps <= step, KNOWN, UNKNOWN)
        if step:
            states[self.steps == step] = NOW
        return states.astype(np.uint8)

    def cells(self, step: int) -> np.ndarray:
        """Raster indices of the cells that `step` chose; of those known before for step 0."""
        return np.flatnonzero(self.steps == step)

    def codes_at(self, step: int) -> np.ndarray:
        """The codes after `step`, int64 (h, w), -1 where they are not known yet."""
        return np.where(self.steps <= step, self.codes, -1)


def pictures_so_far(trace: Trace, generator: ImageGenerator) -> np.ndarray:
    """What had been decoded after each step 0 … n: uint8 (n + 1, H, W, 3), cells not known yet in their grey.

    For the decoder, which looks at neighbours, a cell that is not known has the code of the nearest known cell.
    """
    codes = [_filled(trace.codes_at(step)) for step in range(trace.num_steps + 1)]
    size = generator.model.config.img_size
    batches = torch.from_numpy(np.stack(codes)).split(max(1, _PIXELS_AT_ONCE // size**2))
    pixels = np.concatenate([generator.decode_pixels(batch) for batch in batches])
    stride = size // len(trace.codes)
    for step, picture in enumerate(pixels):
        picture[enlarge(trace.steps > step, stride)] = COLOURS[UNKNOWN]
    return pixels


def cells_picture(trace: Trace, step: int, side: int) -> Image.Image:
    """The grid at `step`, `side` × `side` pixels: cells unknown (light), known (grey), chosen now (green)."""
    image = Image.new("RGB", (side, side), "white")
    draw, edges = ImageDraw.Draw(image), np.linspace(0, side, len(trace.codes) + 1).round().astype(int)
    for (row, column), state in np.ndenumerate(trace.states(step)):
        # One white pixel between cells; PIL's corners belong to the rectangle.
        corners = [edges[column], edges[row], edges[column + 1] - 2, edges[row + 1] - 2]
        draw.rectangle([int(corner) for corner in corners], fill=COLOURS[int(state)])
    return image


def frames(trace: Trace, pictures: np.ndarray) -> list[Image.Image]:
    """For each step the grid, beside it the picture so far, and a caption; the beginning only where cells are known.

    Args:
        pictures: of :func:`pictures_so_far`.
    """
    return list(_frames(trace, pictures))


def _frames(trace: Trace, pictures: np.ndarray) -> Iterator[Image.Image]:
    side, font = pictures.shape[1], ImageFont.load_default(_FONT_SIZE)
    side *= max(1, -(-_SIDE // side))
    for step in range(0 if len(trace.cells(0)) else 1, trace.num_steps + 1):
        frame = Image.new("RGB", (2 * side + 3 * _GAP, side + 2 * _GAP + 2 * _FONT_SIZE), "white")
        frame.paste(cells_picture(trace, step, side), (_GAP, _GAP))
        picture = Image.fromarray(pictures[step]).resize((side, side), Image.Resampling.NEAREST)
        frame.paste(picture, (side + 2 * _GAP, _GAP))
        known = int((trace.steps <= step).sum())
        text = f"step {step} of {trace.num_steps} · {known} of {trace.steps.size} tokens"
        ImageDraw.Draw(frame).text((_GAP, side + _GAP + _FONT_SIZE // 2), text, fill="black", font=font)
        yield frame


def _filled(codes: np.ndarray) -> np.ndarray:
    """Codes (h, w) with each -1 replaced by the nearest other one, the first in raster order of equally near ones."""
    known, unknown = np.argwhere(codes >= 0), np.argwhere(codes < 0)
    if not len(known):
        return np.zeros_like(codes)
    nearest = ((unknown[:, None] - known) ** 2).sum(axis=2).argmin(axis=1)
    filled = codes.copy()
    filled[tuple(unknown.T)] = codes[tuple(known[nearest].T)]
    return filled
