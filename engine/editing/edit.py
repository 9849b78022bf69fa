"""Editing with an any-order decoder: part of a picture is kept, the rest is generated around it.

    codes = generator.encode(picture)
    hole = hole_of_mask(mask, picture.size, generator.model.config.img_size, generator.model.config.grid_size)
    edited = edit(generator, codes, hole, label=3, variants=4, cfg=4.0)      # a Generated, as of generate
    after = [blend(generator.crop(picture), one, hole) for one in edited.pictures]

The known codes enter the key/value cache in one pass and see each other, as the tokens of a group do in training; the
orders of the others grow from the known region (proximity to it counts from the first step on), in as many steps as the
hole's side asks for. Known codes are unchanged in the result. :class:`engine.watch.Trace` shows how it came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from engine.editing.masks import enlarge
from engine.image_generator import Generated, ImageGenerator
from models.sampling import Sampling
from orders.config import OrderConfig
from orders.schedule import default_steps
from util.errors import UserError


def edit(
    generator: ImageGenerator,
    codes: Tensor,
    hole: np.ndarray,
    label: int | None,
    *,
    variants: int = 1,
    steps: int | None = None,
    order: str = "lpd",
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    path: str = "plain",
    **sampling: Any,
) -> Generated:
    """Variants of a picture in which a hole is generated anew.

    Args:
        codes: int64 (L,), the picture's, or (variants, L) where each variant has another one.
        hole: bool (h, w), True where cells are generated. All of them: ordinary generation, the same pictures as
            :meth:`ImageGenerator.generate` makes. None of them: the picture's codes.
        label: class of what is generated; None: without class (then `cfg` must be 1).
        variants: how many.
        numbers: variant i has the order and the draws of this number of the seed; None: of number i.
        steps: of a whole picture, of which the hole takes its part; None: those of the published results.
        order, path, sampling: as for :meth:`ImageGenerator.generate`.

    Raises:
        UserError: for codes, a hole or a setting that do not fit the model.
    """
    config = generator.model.config
    grid = config.grid_size
    if variants < 1:
        raise UserError(f"variants is {variants}; it must be at least 1.")
    if codes.shape not in ((config.num_tokens,), (variants, config.num_tokens)):
        raise UserError(f"codes have shape {tuple(codes.shape)}; a picture of this model has {config.num_tokens}.")
    if hole.shape != (grid, grid):
        raise UserError(f"the hole has {hole.shape} cells; pictures of this model have {grid}×{grid}.")
    steps = default_steps(grid) if steps is None else steps
    known = np.flatnonzero(~hole).tolist()
    orders = OrderConfig(order=order, generation_steps=steps).for_grid(grid, seed, known=known)
    return generator.decode(
        None if label is None else [label] * variants,
        orders,
        range(variants) if numbers is None else numbers,
        seed,
        Sampling(**sampling),
        path,
        codes.expand(variants, -1) if known else None,
    )


def blend(before: Image.Image, after: Image.Image, hole: np.ndarray, feather: float | None = None) -> Image.Image:
    """The picture `after` with the pixels of `before` wherever nothing was generated, and a soft border in between.

    Args:
        before, after: of one size, a multiple of the grid's.
        hole: bool (h, w), the cells that were generated.
        feather: pixels from the border into the hole over which the old picture fades out; 0: a hard border. By default
            half a cell. Pixels outside the hole are those of `before` in any case.
    """
    stride = after.width // hole.shape[1]
    feather = stride / 2 if feather is None else feather
    weight = _distance_to_known(enlarge(hole, stride)) / (feather + 1)
    weight = weight.clip(0, 1)[..., None]
    mixed = np.asarray(before) * (1 - weight) + np.asarray(after) * weight
    return Image.fromarray(mixed.round().astype(np.uint8))


def _distance_to_known(hole: np.ndarray) -> np.ndarray:
    """Euclidean distance in pixels from each pixel to the nearest one that is not in the hole; 0 there."""
    if hole.all():
        return np.full(hole.shape, np.inf)
    from scipy.ndimage import distance_transform_edt  # takes a moment to import

    return distance_transform_edt(hole)
