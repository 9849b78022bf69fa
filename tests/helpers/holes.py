"""Holes of pictures that tests edit."""

from __future__ import annotations

import numpy as np


def holes(grid: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Holes bool (grid, grid) of every kind: True where cells are generated."""
    rng = np.random.default_rng(seed)
    none = np.zeros((grid, grid), bool)
    one, rows, columns = none.copy(), none.copy(), none.copy()
    one[tuple(rng.integers(grid, size=2))] = True
    rows[::2], columns[:, 1::2] = True, True
    return {
        "empty": none,
        "full": ~none,
        "one cell": one,
        "all but one cell": ~one,
        "rows": rows,
        "columns": columns,
        "few": rng.random((grid, grid)) < 0.2,
        "many": rng.random((grid, grid)) < 0.8,
    }
