from __future__ import annotations
from collections.abc import Sequence
import numpy as np
from orders.schedule import check_group_sizes
from util.errors import UserError

ORDER_KINDS = ("lpd", "raster", "random")
GridSize = int | tuple[int, int]


def generate_orders(
    kind: str,
    num: int,
    group_sizes: Sequence[int],
    grid_size: GridSize,
    proximity_threshold: float = 1.0,
    repulsion_threshold: int | None = None,
    seed: int = 0,
    *,
    indices: Sequence[int] | None = None,
    device: str = "cpu",
    workers: int | None = None,
) -> np.ndarray:
    h, w = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    L = h * w
    sizes = check_group_sizes(group_sizes, L)
    if kind not in ORDER_KINDS:
        raise UserError(f"order {kind!r} must be one of {', '.join(ORDER_KINDS)}")
    rho = max(1, min(h, w) // 8) if repulsion_threshold is None else repulsion_threshold
    out = np.empty((num, L), np.int16)
    for k, i in enumerate(range(num) if indices is None else indices):
        rng = np.random.default_rng([seed, int(i)])
        if kind == "raster":
            out[k] = np.arange(L)
        elif kind == "random":
            out[k] = rng.permutation(L)
        else:
            out[k] = _one(rng, sizes, h, w, proximity_threshold, rho)
    return out


def _one(rng, sizes, h, w, tau, rho):
    L = h * w
    sel = np.zeros((h + 2, w + 2))
    order = [int(rng.integers(L))]
    sel[order[0] // w + 1, order[0] % w + 1] = 1
    for g in sizes[1:]:
        e = sel[:-2, 1:-1] + sel[2:, 1:-1] + sel[1:-1, :-2] + sel[1:-1, 2:]
        c = sel[:-2, :-2] + sel[2:, 2:] + sel[2:, :-2] + sel[:-2, 2:]
        p = np.round(e + c / np.sqrt(2), 6).ravel()
        cells = [x for x in rng.permutation(L) if not sel[x // w + 1, x % w + 1]]
        cells.sort(key=lambda x: -p[x])
        taken, B, rest = [], [x for x in cells if p[x] < tau], []
        for x in (x for x in cells if p[x] >= tau):
            if len(taken) < g and all(max(abs(x // w - y // w), abs(x % w - y % w)) > rho for y in taken):
                taken.append(x)
            else:
                rest.append(x)
        B += rest
        while len(taken) < g:
            if not taken:
                x = B[rng.integers(len(B))]
            else:
                x = max(B, key=lambda x: min((x // w - y // w) ** 2 + (x % w - y % w) ** 2 for y in taken))
            taken.append(x)
            B.remove(x)
        for x in taken:
            sel[x // w + 1, x % w + 1] = 1
        order += taken
    return order
