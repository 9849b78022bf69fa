"""What likelihoods say: means with standard errors, paired differences with confidence intervals, a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from engine.likelihood.cells import Cell
from engine.likelihood.measure import Measured
from engine.likelihood.passes import Decoding

CONFIDENCE = 0.95


def with_one_by_one(cells: Sequence[Cell], one_by_one: bool) -> list[Decoding]:
    """All that has to be measured for these cells, without repetitions.

    Args:
        one_by_one: measure the orders of each cell one by one too, for the loss by parallel drawing.
    """
    found: dict[str, Decoding] = {}
    for cell in cells:
        for decoding in (cell.decoding, cell.decoding.one_by_one())[: 1 + one_by_one]:
            found.setdefault(decoding.key, decoding)
    return list(found.values())


def mean(values: NDArray[np.float64]) -> dict[str, float]:
    """``mean`` and ``stderr`` over images (N,), N ≥ 2."""
    return {"mean": float(values.mean()), "stderr": float(values.std(ddof=1) / math.sqrt(len(values)))}


def paired(values: NDArray[np.float64], others: NDArray[np.float64]) -> dict[str, float]:
    """Mean difference of the same images (N,), its ``stderr``, and ``low`` and ``high`` of its 95 % interval."""
    found = mean(values - others)
    reach = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * found["stderr"]
    return found | {"low": found["mean"] - reach, "high": found["mean"] + reach}


def rows(
    cells: Sequence[Cell],
    compared_with: Sequence[int | None],
    decodings: Sequence[Decoding],
    measured: Measured,
    pixels: int,
) -> list[dict[str, Any]]:
    """A dict of plain data for each cell.

    ``bits_per_token``: mean and stderr over images; ``difference``: paired, to the cell ``baseline``, None where there
    is none; ``parallel_loss``: paired, to the same orders one by one, where they were measured; ``step_bits``: bits per
    token of each step, with ``step_stderr``; ``position_bits``: bits of each raster index. All but ``bits_per_pixel``
    are per token.

    Args:
        compared_with: see :func:`engine.likelihood.cells.baselines`.
        pixels: of an image.
    """
    place = {decoding.key: number for number, decoding in enumerate(decodings)}
    count, L = len(measured.image_bits), measured.positions.shape[1]
    per_token = measured.image_bits / L
    found = []
    for cell, baseline in zip(cells, compared_with, strict=True):
        number, spec = place[cell.decoding.key], cell.decoding.orders.spec
        mine, alone = per_token[:, number], place.get(cell.decoding.one_by_one().key)
        sizes = np.array(cell.decoding.group_sizes)
        total, squares = measured.steps[number]
        step_mean = total / count
        variance = np.maximum(squares / count - step_mean**2, 0) / (count - 1)
        from_file = cell.decoding.orders.rows is not None
        found.append(
            {
                "name": cell.name,
                "order": cell.order,
                "steps": cell.steps,
                "with_class": cell.decoding.with_class,
                "group_sizes": sizes.tolist(),
                "proximity_threshold": None if from_file else spec.proximity_threshold,
                "repulsion_threshold": None if from_file else spec.repulsion_threshold,
                "bits_per_token": mean(mine),
                "bits_per_pixel": mean(mine * (L / pixels)),
                "baseline": None if baseline is None else cells[baseline].name,
                "difference": None
                if baseline is None
                else paired(mine, per_token[:, place[cells[baseline].decoding.key]]),
                "parallel_loss": None if alone is None else paired(mine, per_token[:, alone]),
                "step_bits": (step_mean / sizes).tolist(),
                "step_stderr": (np.sqrt(variance) / sizes).tolist(),
                "position_bits": (measured.positions[number] / count).tolist(),
            }
        )
    return found


def show(difference: dict[str, float] | None) -> str:
    """``+0.012 [+0.008, +0.016]``, a dash where there is none."""
    if difference is None:
        return "–"
    return "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Of rows, as Markdown."""
    heads = ["order", "steps", "bits per token", "bits per pixel", "difference to the baseline", "baseline"]
    if has_loss := any(row["parallel_loss"] is not None for row in found):
        heads.append("lost by parallel drawing")
    if has_classes := len({row["with_class"] for row in found}) > 1:
        heads.insert(2, "class")
    lines = [heads, ["---"] * len(heads)]
    for row in found:
        own = row["baseline"] == row["name"]
        cells = [
            row["order"],
            str(row["steps"]),
            "{mean:.3f} ± {stderr:.3f}".format(**row["bits_per_token"]),
            "{mean:.4f}".format(**row["bits_per_pixel"]),
            "–" if own else show(row["difference"]),
            "–" if own or row["baseline"] is None else row["baseline"],
        ]
        if has_loss:
            cells.append("–" if set(row["group_sizes"]) == {1} else show(row["parallel_loss"]))
        if has_classes:
            cells.insert(2, "with" if row["with_class"] else "without")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
