"""Plots of likelihoods: against steps, along the steps, and over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util.plots import plot_curves


def draw(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Plots of the rows of :func:`engine.likelihood.report.rows`: with class only, where there are both.

    ``steps.png`` has bits per token against the number of steps, ``curves.png`` how the difference to the baseline
    comes about from step to step, ``positions.png`` bits of each token of the grid.
    """
    kept = [row for row in rows if row["with_class"]] or list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, Any] = {}
    for order in dict.fromkeys(row["order"] for row in kept):
        mine = sorted((row for row in kept if row["order"] == order), key=lambda row: row["steps"])
        bits = [row["bits_per_token"] for row in mine]
        curves[order] = ([row["steps"] for row in mine], [b["mean"] for b in bits], [b["stderr"] for b in bits])
    plot_curves(folder / "steps.png", curves, "decoding steps", "bits per token ± standard error", log_x=True)
    _draw_curves(folder / "curves.png", kept)
    _draw_positions(folder / "positions.png", kept)
    return [folder / name for name in ("steps.png", "curves.png", "positions.png")]


def _draw_curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Bits up to each step less those of the baseline, per token of the image: the last point is the difference."""
    from matplotlib.figure import Figure  # takes a second

    counts = sorted({row["steps"] for row in rows}, reverse=True)
    columns = min(3, len(counts))
    figure = Figure(figsize=(4.2 * columns, 3.2 * math.ceil(len(counts) / columns) + 0.6), layout="constrained")
    orders = list(dict.fromkeys(row["order"] for row in rows))
    by_name, handles = {row["name"]: row for row in rows}, {}
    for number, steps in enumerate(counts, 1):
        axis = figure.add_subplot(math.ceil(len(counts) / columns), columns, number)
        for row in (row for row in rows if row["steps"] == steps and row["baseline"] is not None):
            known, bits = _so_far(row)
            less = bits - np.interp(known, *_so_far(by_name[row["baseline"]]))
            marker, color = "." if steps <= 32 else "", f"C{orders.index(row['order'])}"
            handles[row["order"]] = axis.plot(known, less, marker=marker, color=color, lw=1)[0]
        axis.set(title=f"{steps} steps", xlabel="share of tokens known", ylabel="difference so far, bits per token")
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)))
    figure.savefig(path, dpi=90)


def _so_far(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(share of tokens known, bits so far per token of the image) before the first step and after each, (S + 1,)."""
    sizes = np.array(row["group_sizes"])
    bits = np.cumsum([0, *(sizes * row["step_bits"])])
    return np.cumsum([0, *sizes]) / sizes.sum(), bits / sizes.sum()


def _draw_positions(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A map per cell on one scale, orders down and steps across."""
    from matplotlib.figure import Figure

    orders = list(dict.fromkeys(row["order"] for row in rows))
    counts = sorted({row["steps"] for row in rows}, reverse=True)
    side = math.isqrt(len(rows[0]["position_bits"]))
    most = max(max(row["position_bits"]) for row in rows)
    figure = Figure(figsize=(1.35 * len(counts) + 1.2, 1.35 * len(orders) + 0.6), layout="constrained")
    axes = figure.subplots(len(orders), len(counts), squeeze=False)
    image = None
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for row in rows:
        axis = axes[orders.index(row["order"])][counts.index(row["steps"])]
        image = axis.imshow(np.reshape(row["position_bits"], (side, side)), vmin=0, vmax=most)
    for axis, order in zip(axes[:, 0], orders, strict=True):
        axis.set_ylabel(order, fontsize=8)
    for axis, steps in zip(axes[0], counts, strict=True):
        axis.set_title(f"{steps} steps", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes, label="bits", shrink=0.6)
    figure.savefig(path, dpi=80)
