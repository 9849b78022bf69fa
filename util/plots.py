"""Plots of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from util.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes a second

SUFFIXES = (".png", ".pdf", ".svg")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the suffix, one of `SUFFIXES`, atomically."""
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=110)


def plot_curves(path: Path, curves: Mapping[str, Sequence[Any]], xlabel: str, ylabel: str, log_x: bool = False) -> None:
    """Draw curves, by their label: (x, y), or (x, y, deviation) with error bars, sequences of one length each.

    Args:
        log_x: x holds a few numbers, such as those of steps: a logarithmic axis, and a mark at each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for label, curve in curves.items():
        axis.errorbar(*curve, label=label, marker="o" if log_x or len(curve[0]) == 1 else None, markersize=4)
    if log_x:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    if curves:
        figure.legend(loc="outside right upper")
    save_figure(figure, path)


def plot_attention(path: Path, distances: Sequence[int], per_token: Any, even: Sequence[float], title: str) -> None:
    """Draw attention against distance, a panel per layer with a line per head, their mean, and even attention.

    Args:
        per_token: (layers, heads, distances).
        even: (distances,).
    """
    from matplotlib.figure import Figure

    layers = np.asarray(per_token)
    columns = min(len(layers), 2 * math.ceil(math.sqrt(len(layers) / 2)))  # about twice as many as rows
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(2 + 2.2 * columns, 1.2 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for number, (panel, heads) in enumerate(zip(panels, layers, strict=False)):
        for head, values in enumerate(heads):
            panel.plot(distances, values, color="C0", alpha=0.35, lw=0.8, label="a head" if head == 0 else None)
        panel.plot(distances, heads.mean(axis=0), color="C0", lw=2, label="mean of the heads")
        panel.plot(distances, even, color="black", ls="--", lw=1, label="spread evenly")
        panel.set(title=f"layer {number + 1}", yscale="log")
        panel.grid(alpha=0.3)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    figure.suptitle(title)
    figure.supxlabel("distance, cells")
    figure.supylabel("attention per token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    save_figure(figure, path)
