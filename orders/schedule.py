"""Group sizes: how many tokens each decoding step generates.

A schedule is a tuple of positive integers that sum to the number of tokens ``L``; step ``s`` generates the next
``sizes[s]`` positions of the generation order at once.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from util.errors import UserError

GridSize = int | tuple[int, int]

_PUBLISHED = Path(__file__).parent / "group_sizes_training"

# Group sizes as text, without spaces: "1,3,5", and a term of a sum such as "[1,2]*3" or "3*[1,2]".
_NUMBER = "[1-9][0-9]{0,17}"  # longer ones may be more than int() takes
_SIZES = re.compile(f"{_NUMBER}(?:,{_NUMBER})*")
_TERM = re.compile(rf"(?:({_NUMBER})\*)?\[({_SIZES.pattern})\](?:\*({_NUMBER}))?")


def grid_shape(grid_size: GridSize) -> tuple[int, int]:
    """(rows, columns) of a token grid given as the side of a square or as that pair; ``UserError`` otherwise."""
    try:
        sides = tuple(operator.index(side) for side in np.broadcast_to(np.asarray(grid_size), 2))
    except (TypeError, ValueError):
        sides = ()
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"grid size {grid_size!r} must be a positive integer or a pair of them (rows, columns).")
    return sides[0], sides[1]


@functools.cache
def _published_schedules(side: int) -> tuple[tuple[int, ...], ...]:
    """The published schedules of a square grid, most steps first; none for any other side than 16 and 32.

    Decoding uses them as they stand; training draws one of its resolution's per iteration.
    """
    if side not in (16, 32):
        return ()
    return tuple(map(tuple, json.loads((_PUBLISHED / f"group_sizes_{16 * side}.json").read_text())))


def grid_side(img_size: int, stride: int) -> int:
    """Tokens per side of a square image; ``UserError`` unless the stride divides its size."""
    if stride < 1 or img_size < stride or img_size % stride:
        raise UserError(f"image size {img_size} must be a positive multiple of the tokenizer's stride {stride}.")
    return img_size // stride


def group_sizes(img_size: int, steps: int, stride: int = 16) -> tuple[int, ...]:
    """Sizes of the ``steps`` groups for a square image of ``img_size`` pixels and a tokenizer of this stride.

    The published schedule where there is one (16×16 and 32×32 grids at the published step counts), else the cosine of
    :func:`cosine_group_sizes`. Raises ``UserError`` for a size that is not a multiple of the stride and for a number of
    steps outside 1 … L.
    """
    return grid_group_sizes(grid_side(img_size, stride), steps)


def grid_group_sizes(grid_size: GridSize, steps: int) -> tuple[int, ...]:
    """The same for a token grid, which need not be square."""
    h, w = grid_shape(grid_size)
    published = _published_schedules(h) if h == w else ()
    return next((sizes for sizes in published if len(sizes) == steps), None) or cosine_group_sizes(h * w, steps)


def default_steps(grid_size: GridSize) -> int:
    """Steps for a grid when nobody asks for a number: those of the main published results.

    20 for 16×16 and 48 for 32×32; any other grid the 12.8 tokens per step of the former, at least two steps.
    """
    grid = grid_shape(grid_size)
    tokens = grid[0] * grid[1]
    return {(16, 16): 20, (32, 32): 48}.get(grid, min(tokens, max(2, round(tokens * 20 / 256))))


def hole_group_sizes(grid_size: GridSize, steps: int, hole: int) -> tuple[int, ...]:
    """The same for ``hole`` cells that are generated into a picture whose other cells are known; () for none.

    Args:
        steps: those of a whole picture. A hole takes as many of them as its side is long in the picture's:
            steps · √(hole / L), rounded up, since neighbours within it cannot come at once however small it is.
    """
    h, w = grid_shape(grid_size)
    _check_steps(h * w, steps)
    if not 0 < hole < h * w:
        return grid_group_sizes(grid_size, steps) if hole else ()
    return cosine_group_sizes(hole, min(hole, math.ceil(steps * math.sqrt(hole / (h * w)))))


def published_group_sizes(img_size: int, stride: int = 16) -> list[tuple[int, ...]]:
    """The schedules that training draws from, uniformly, at this resolution: most steps first.

    For 16×16 and 32×32 grids all published ones. Any other grid gets cosine schedules at the same tokens per step as
    the nine of the 16×16 grid (n = L·m/256 steps for m = 256, 128, 64, 32, 24, 20, 16, 12, 8, rounded, without
    repetitions and at least 2).
    """
    side = grid_side(img_size, stride)
    if published := _published_schedules(side):
        return list(published)
    tokens = side * side
    least = min(2, tokens)
    counts = {max(least, round(tokens * len(sizes) / 256)) for sizes in _published_schedules(16)}
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
    """The group sizes that a text stands for: what a flag takes.

    Args:
        text: ``1,3,5``; a JSON list; a sum of lists and their multiples, such as ``[1]*10+[2]*7``, which is read and
            never evaluated; a file (.json, .txt) that holds one of these; or ``uniform:STEPS``.
        num_tokens: what the sizes must sum to.

    Raises:
        UserError: unless they are positive integers that do.
    """
    text = text.strip()
    if uniform := re.fullmatch("uniform:([0-9]{1,18})", text):
        return uniform_group_sizes(num_tokens, int(uniform[1]))
    if text.endswith((".json", ".txt")):
        if not os.path.isfile(text):
            raise UserError(f"group-sizes file {text!r} does not exist.")
        text = Path(text).read_text("utf-8", errors="replace").strip()
    compact = re.sub(r" ?([\[\],*+]) ?", r"\1", " ".join(text.split()))
    terms = []
    for term in (f"[{compact}]" if _SIZES.fullmatch(compact) else compact).split("+"):
        match = _TERM.fullmatch(term)
        if not match:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise UserError(
                f"group sizes {shown!r} must be positive integers such as '1,3,5,7', '[1, 3, 5, 7]' or '[1]*2+[7]*2'."
            )
        sizes = [int(size) for size in match[2].split(",")]
        terms.append((sizes, int(match[1] or 1) * int(match[3] or 1)))
    _check_sum(sum(sum(sizes) * times for sizes, times in terms), num_tokens)  # before lists of any length are made
    return tuple(size for sizes, times in terms for size in sizes * times)


def check_group_sizes(sizes: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """``sizes`` as a tuple; ``UserError`` unless they are positive integers that sum to ``num_tokens``."""
    try:
        result = tuple(operator.index(size) for size in sizes)
    except TypeError:
        result = ()
    if not result or min(result) < 1:
        raise UserError(f"group sizes must be positive integers, got {list(sizes)}.")
    _check_sum(sum(result), num_tokens)
    return result


def _check_sum(total: int, num_tokens: int) -> None:
    if total != num_tokens:
        raise UserError(f"group sizes sum to {total}, but the grid has {num_tokens} tokens.")


def _check_steps(num_tokens: int, steps: int) -> None:
    if not 1 <= steps <= num_tokens:
        raise UserError(f"number of steps {steps} must lie between 1 and the {num_tokens} tokens of the grid.")
