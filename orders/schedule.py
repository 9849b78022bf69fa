"""Group sizes: how many tokens each decoding step generates.

A schedule is a tuple of positive integers that sum to the number of tokens ``L``; step ``s`` generates the next
``sizes[s]`` positions of the generation order at once.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from util.errors import UserError

# The published schedules ("size×count", in order), by grid side and number of steps. They serve decoding as they stand,
# and training draws one of its resolution's rows per iteration.
_PUBLISHED: dict[int, dict[int, str]] = {
    16: {
        256: "1×256",
        128: "1×41 2×46 3×41",
        64: "1×10 2×7 3×7 4×9 5×11 6×20",
        32: "1×2 2×2 3×2 4×1 5×2 6×2 7×2 8×2 9×2 10×3 11×4 12×8",
        24: "1×1 2×1 3×1 4×1 5×1 6×1 7×1 8×1 9×1 10×1 11×2 12×1 13×1 14×3 15×2 16×3 17×2",
        20: "1×1 2×1 4×1 5×1 7×1 8×1 10×1 11×1 12×1 14×1 15×1 16×1 17×1 18×2 19×2 20×3",
        16: "1×1 4×1 6×1 8×1 11×1 13×1 15×1 17×1 19×1 20×1 22×1 23×1 24×3 25×1",
        12: "1×1 7×1 11×1 15×1 19×1 22×1 25×1 28×1 30×1 32×1 33×2",
        8: "1×1 15×1 24×1 32×1 40×1 45×1 49×1 50×1",
    },
    32: {
        1024: "1×1024",
        512: "1×162 2×188 3×162",
        256: "1×39 2×28 3×31 4×34 5×44 6×80",
        224: "1×32 2×21 3×21 4×24 5×27 6×37 7×62",
        192: "1×22 2×15 3×16 4×16 5×19 6×21 7×27 8×55 10×1",
        160: "1×15 2×11 3×10 4×12 5×12 6×13 7×14 8×17 9×23 10×33",
        128: "1×10 2×6 3×7 4×7 5×7 6×7 7×8 8×9 9×9 10×11 11×14 12×26 13×7",
        96: "1×5 2×4 3×4 4×4 5×3 6×4 7×4 8×5 9×4 10×4 11×6 12×5 13×6 14×7 15×8 16×13 17×10",
        80: "1×4 2×2 3×3 4×2 5×3 6×3 7×2 8×3 9×3 10×3 11×3 12×3 13×3 14×4 15×4 16×4 17×6 18×6 19×7 20×12",
        64: "1×2 2×2 3×2 4×1 5×2 6×2 7×1 8×2 9×2 10×2 11×1 12×2 13×2 14×2 15×2 16×2 17×2 18×3 19×2 20×3 21×3 22×3 "
        "23×5 24×6 25×8",
        56: "1×2 2×1 3×1 4×2 5×1 6×1 7×1 8×2 9×1 10×1 11×2 12×1 13×1 14×2 15×1 16×2 17×1 18×2 19×2 20×1 21×2 22×2 "
        "23×2 24×2 25×3 26×3 27×5 28×6 29×3",
        48: " ".join(f"{size}×1" for size in range(1, 23))
        + " 23×2 24×1 25×1 26×2 27×1 28×2 29×2 30×2 31×2 32×3 33×7 34×1",
        40: "1×1 2×1 4×1 6×1 7×1 9×1 10×1 12×1 13×1 15×1 16×1 18×1 19×1 20×1 22×1 23×1 24×1 26×1 27×1 28×1 29×1 30×1 "
        "31×1 32×1 33×1 34×1 35×2 36×1 37×2 38×2 39×3 40×4",
        32: "1×1 4×1 6×1 9×1 11×1 13×1 16×1 18×1 20×1 23×1 25×1 27×1 29×1 31×1 33×1 35×1 36×1 38×1 40×1 41×1 42×1 "
        "44×1 45×1 46×1 47×1 48×2 49×2 50×3",
    },
}


GridSize = int | tuple[int, int]


def grid_shape(grid_size: GridSize) -> tuple[int, int]:
    """(rows, columns) of a token grid given as the side of a square or as that pair; ``UserError`` otherwise."""
    try:
        sides = tuple(operator.index(side) for side in np.broadcast_to(np.asarray(grid_size), 2))
    except (TypeError, ValueError):
        sides = ()
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"grid size {grid_size!r} must be a positive integer or a pair of them (rows, columns).")
    return sides[0], sides[1]


def _expand(row: str) -> tuple[int, ...]:
    pairs = (item.split("×") for item in row.split())
    return tuple(int(size) for size, count in pairs for _ in range(int(count)))


def _grid_side(img_size: int, stride: int) -> int:
    if stride < 1 or img_size < stride or img_size % stride:
        raise UserError(f"image size {img_size} must be a positive multiple of the tokenizer's stride {stride}.")
    return img_size // stride


def group_sizes(img_size: int, steps: int, stride: int = 16) -> tuple[int, ...]:
    """Sizes of the ``steps`` groups for a square image of ``img_size`` pixels and a tokenizer of this stride.

    The published schedule where there is one (16×16 and 32×32 grids at the published step counts), else the cosine of
    :func:`cosine_group_sizes`. Raises ``UserError`` for a size that is no multiple of the stride and for a number of
    steps outside 1 … L.
    """
    return grid_group_sizes(_grid_side(img_size, stride), steps)


def grid_group_sizes(grid_size: GridSize, steps: int) -> tuple[int, ...]:
    """The same for a token grid, which need not be square."""
    h, w = grid_shape(grid_size)
    row = _PUBLISHED.get(h, {}).get(steps) if h == w else None
    return _expand(row) if row else cosine_group_sizes(h * w, steps)


def default_steps(grid_size: GridSize) -> int:
    """Steps for a grid when nobody asks for a number: those of the main published results.

    20 for 16×16 and 48 for 32×32; any other grid the 12.8 tokens per step of the former, at least two steps.
    """
    grid = grid_shape(grid_size)
    tokens = grid[0] * grid[1]
    return {(16, 16): 20, (32, 32): 48}.get(grid, min(tokens, max(2, round(tokens * 20 / 256))))


def published_group_sizes(img_size: int, stride: int = 16) -> list[tuple[int, ...]]:
    """The schedules that training draws from, uniformly, at this resolution: most steps first.

    For 16×16 and 32×32 grids all published rows. Any other grid gets cosine schedules at the same tokens per step as
    the nine rows of the 16×16 grid (n = L·m/256 steps for m = 256, 128, 64, 32, 24, 20, 16, 12, 8, rounded, without
    repetitions and at least 2).
    """
    side = _grid_side(img_size, stride)
    if side in _PUBLISHED:
        return [_expand(row) for row in _PUBLISHED[side].values()]
    tokens = side * side
    least = min(2, tokens)
    counts = {max(least, round(tokens * steps / 256)) for steps in _PUBLISHED[16]}
    return [cosine_group_sizes(tokens, steps) for steps in sorted(counts, reverse=True)]


def cosine_group_sizes(num_tokens: int, steps: int) -> tuple[int, ...]:
    """Cosine schedule (MaskGIT's mask ratio, arXiv:2202.04200) of any length for any number of tokens.

    ``g_s ≈ L·(cos(π(s−1)/(2n)) − cos(πs/(2n)))``, rounded; the first group is 1, every group at least 1, the sizes
    never decrease and sum to L exactly, and each is within 1 of the rounded cosine where that is possible. One step is
    ``(L,)``. Raises ``UserError`` unless 1 ≤ steps ≤ num_tokens.
    """
    _check_steps(num_tokens, steps)
    if steps == 1:
        return (num_tokens,)
    ideal = [
        num_tokens * (math.cos(math.pi * s / (2 * steps)) - math.cos(math.pi * (s + 1) / (2 * steps)))
        for s in range(steps)
    ]
    rounded = [math.floor(size + 0.5) for size in ideal]
    sizes = [1, *(max(1, size) for size in rounded[1:])]
    # Hand out what is missing, or take back what is too much, one by one where it hurts least. Among equal sizes the
    # cosine rises with s, so the later is raised and the earlier lowered first: the sizes never decrease.
    missing = num_tokens - sum(sizes)
    for _ in range(abs(missing)):
        if missing > 0:
            s = min(range(1, steps), key=lambda s: (sizes[s] - rounded[s], sizes[s] - ideal[s], -s))
            sizes[s] += 1
        else:
            s = min((s for s in range(1, steps) if sizes[s] > 1), key=lambda s: (ideal[s] - sizes[s], s))
            sizes[s] -= 1
    return tuple(sizes)


def uniform_group_sizes(num_tokens: int, steps: int) -> tuple[int, ...]:
    """First group 1, then groups of equal size (to within 1, the larger ones last). One step is ``(L,)``.

    Raises ``UserError`` unless 1 ≤ steps ≤ num_tokens.
    """
    _check_steps(num_tokens, steps)
    if steps == 1:
        return (num_tokens,)
    size, larger = divmod(num_tokens - 1, steps - 1)
    return (1, *([size] * (steps - 1 - larger)), *([size + 1] * larger))


def parse_group_sizes(text: str, num_tokens: int) -> tuple[int, ...]:
    """Group sizes that a user asks for: ``1,3,5``, a JSON list, a file (.json, .txt) with either, or ``uniform:STEPS``.

    Raises ``UserError`` unless the result is a list of positive integers that sum to ``num_tokens``.
    """
    text = text.strip()
    if uniform := re.fullmatch(r"uniform:(\d+)", text):
        return uniform_group_sizes(num_tokens, int(uniform[1]))
    if text.endswith((".json", ".txt")):
        path = Path(text)
        if not path.is_file():
            raise UserError(f"group-sizes file {text!r} does not exist.")
        text = path.read_text().strip()
    if not re.fullmatch(r"\[?\s*\d+(\s*,\s*\d+)*\s*\]?", text) or text.startswith("[") != text.endswith("]"):
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise UserError(f"group sizes {shown!r} must be positive integers such as '1,3,5,7' or '[1, 3, 5, 7]'.")
    return check_group_sizes([int(size) for size in re.findall(r"\d+", text)], num_tokens)


def check_group_sizes(sizes: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """``sizes`` as a tuple; ``UserError`` unless they are positive integers that sum to ``num_tokens``."""
    try:
        result = tuple(operator.index(size) for size in sizes)
    except TypeError:
        result = ()
    if not result or min(result) < 1:
        raise UserError(f"group sizes must be positive integers, got {list(sizes)}.")
    if sum(result) != num_tokens:
        raise UserError(f"group sizes sum to {sum(result)}, but the grid has {num_tokens} tokens.")
    return result


def _check_steps(num_tokens: int, steps: int) -> None:
    if num_tokens < 1:
        raise UserError(f"a grid needs at least one token, got {num_tokens}.")
    if not 1 <= steps <= num_tokens:
        raise UserError(f"number of steps {steps} must lie between 1 and the {num_tokens} tokens of the grid.")
