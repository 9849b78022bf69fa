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


def _checkerboard_order(grid: Grid) -> np.ndarray:
    """Balanced progressive checkerboard (arXiv:2602.03811): every step is spread evenly over all quadtree cells.

    Worked out from that property. The base-4 digits of a token's place in the order, the lowest first, are its
    quadrants from the whole image down, opposite ones in turn. So any run of g places has g/4^k tokens, rounded up or
    down, in each of the 4^k quadtree cells of level k, whatever the group sizes are. (It is the order of Bayer's
    dither matrix.) Sides that are no powers of two are halved as evenly as they can be.
    """
    levels = (max(grid) - 1).bit_length()
    rows, columns = _halves(grid[0], levels)[:, :, None], _halves(grid[1], levels)[:, None]
    quadrants = 2 * (rows ^ columns) + rows  # 0 and 1 are opposite, 2 and 3 too
    places = (quadrants << 2 * np.arange(levels)[:, None, None]).sum(0)
    return np.argsort(places.ravel(), kind="stable")


def _halves(side: int, levels: int) -> np.ndarray:
    """In which half, 0 or 1, of a range halved again and again each of ``side`` numbers lies: (levels, side)."""
    numbers, start, stop = np.arange(side), np.zeros(side, np.int64), np.full(side, side)
    halves = np.zeros((levels, side), np.int64)
    for half in halves:
        middle = (start + stop + 1) // 2
        half[:] = numbers >= middle
        start, stop = np.where(half, middle, start), np.where(half, stop, middle)
    return halves


_SEQUENCES = {"halton": _halton_order, "checkerboard": _checkerboard_order}
FIXED_KINDS = (*_SEQUENCES, *_STEPS)


def fixed_order(kind: str, grid: Grid) -> np.ndarray:
    """The order of one of ``FIXED_KINDS``, the same for every image: int64 (L,)."""
    return _SEQUENCES[kind](grid) if kind in _SEQUENCES else np.argsort(_STEPS[kind](grid), kind="stable")


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
