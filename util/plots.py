"""Plots of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_curves(path: Path, curves: Mapping[str, Sequence[Any]], xlabel: str, ylabel: str, log_x: bool = False) -> None:
    """Draw curves, by their label: (x, y), or (x, y, deviation) with error bars, sequences of one length each."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for label, curve in curves.items():
        axis.errorbar(*curve, label=label)
    if log_x:
        axis.set_xscale("log", base=2)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    if curves:
        figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
