"""The orders of other papers, and the group sizes with which each paper decodes.

All cells are raster indices (row·w + column) of an (h, w) grid.
"""

from __future__ import annotations

import numpy as np

from orders.order_states import order_states, sub_states
from orders.schedule import GridSize, default_steps, grid_group_sizes, grid_shape
from util.errors import UserError

PAR_REGIONS = 4  # per side: 16 in all, as in the PAR paper
ZIPAR_WINDOW = 2

Grid = tuple[int, int]


def _raster_steps(grid: Grid) -> np.ndarray:
    """Row by row, one token per step: the order of VQGAN (arXiv:2012.09841) and LlamaGen (arXiv:2406.06525)."""
    return np.arange(grid[0] * grid[1])


def _par_steps(grid: Grid) -> np.ndarray:
    """Region-parallel order of PAR (arXiv:2412.15119).

    The grid is cut into 4×4 regions; the first token of each comes one by one, then every step generates the next
    token, in raster order of the region, of all regions at once.
    """
    in_region = [
        np.concatenate([np.arange(len(part)) for part in np.array_split(np.arange(side), min(PAR_REGIONS, side))])
        for side in grid
    ]
    places = (in_region[0][:, None] * grid[1] + in_region[1]).ravel()
    first = places == 0
    ranks = np.unique(places, return_inverse=True)[1]
    return np.where(first, first.cumsum(), first.sum() + ranks) - 1


def _zipar_steps(grid: Grid) -> np.ndarray:
    """Diagonal order of ZipAR (arXiv:2412.04062).

    Every row is generated from left to right and starts as soon as the row above is two tokens (the window) ahead, so
    that a slanted front of one token per row moves over the image.
    """
    return (min(ZIPAR_WINDOW, grid[1]) * np.arange(grid[0])[:, None] + np.arange(grid[1])).ravel()


def _nar_steps(grid: Grid) -> np.ndarray:
    """Neighbouring expansion of NAR (arXiv:2503.10696): by Manhattan distance from the top left corner."""
    return np.add.outer(*map(np.arange, grid)).ravel()


# The step, from 0 on, in which each cell is generated, (L,); the cells of a step come in raster order.
_STEPS = {"raster": _raster_steps, "par": _par_steps, "zipar": _zipar_steps, "nar": _nar_steps}


def _halton_order(grid: Grid) -> np.ndarray:
    """Low-discrepancy order of Halton-MaskGIT (arXiv:2503.17076).

    The points 1, 2, … of the two-dimensional Halton sequence in bases 2 (rows) and 3 (columns), each naming the cell
    that holds it, without repetitions: every prefix covers the image evenly.
    """
    h, w = grid
    cells, count = np.empty(0, np.int64), 8 * h * w
    while len(cells) < h * w:
        points = np.arange(1, count + 1)
        visited = _mirrored_cells(points, 2, h) * w + _mirrored_cells(points, 3, w)
        first = np.sort(np.unique(visited, return_index=True)[1])
        cells, count = visited[first], 2 * count
    return cells


def _mirrored_cells(numbers: np.ndarray, base: int, side: int) -> np.ndarray:
    """In which of ``side`` equal parts of [0, 1) the numbers' digits, mirrored at the radix point, lie.

    Computed in integers, as some points lie exactly on the border of two parts.
    """
    numerator, denominator = np.zeros_like(numbers), 1
    while numbers.any():
        numbers, digits = np.divmod(numbers, base)
        numerator, denominator = numerator * base + digits, denominator * base
    return numerator * side // denominator


FIXED_KINDS = ("halton", *_STEPS)


def fixed_order(kind: str, grid: Grid) -> np.ndarray:
    """The order of one of ``FIXED_KINDS``, the same for every image: int64 (L,)."""
    return _halton_order(grid) if kind == "halton" else np.argsort(_STEPS[kind](grid), kind="stable")


def random_orders(indices: np.ndarray, num_cells: int, seed: int) -> np.ndarray:
    """Uniformly random permutations, as RandAR (arXiv:2412.01827) and ARPG (arXiv:2503.10568) decode: int64 (N, L).

    ``indices`` (N,), int64, are the order numbers; each order follows from (seed, number).
    """
    states = order_states(indices, seed)
    index_bits = (num_cells - 1).bit_length()
    bits = sub_states(states[:, None], np.arange(num_cells))
    bits = (bits & ~((1 << index_bits) - 1)) | np.arange(num_cells)  # the cell's number in place of the low bits
    bits.sort(axis=1)
    return bits & ((1 << index_bits) - 1)


def natural_group_sizes(kind: str, grid_size: GridSize, steps: int | None = None) -> tuple[int, ...]:
    """The group sizes with which the paper of this order decodes, for any grid.

    Raster order takes one token per step; PAR, ZipAR and NAR take what their geometry makes independent, so that the
    number of steps follows from the grid: ``steps`` must be None or that number, else ``UserError``. The other kinds
    take any number of steps: :func:`orders.schedule.grid_group_sizes` of ``steps``, or of the published number where it
    is None. (MaskGIT, RandAR, ARPG and Halton-MaskGIT use the same cosine.)
    """
    grid = grid_shape(grid_size)
    if kind not in _STEPS:
        return grid_group_sizes(grid, default_steps(grid) if steps is None else steps)
    sizes = tuple(np.bincount(_STEPS[kind](grid)).tolist())
    if steps not in (None, len(sizes)):
        raise UserError(
            f"order {kind!r} takes {len(sizes)} steps of its own on a {grid[0]}×{grid[1]} grid, not {steps}; "
            "give group sizes to cut it otherwise."
        )
    return sizes
