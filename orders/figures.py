"""Figures of orders: which step generates which token, what a step knows, and a grid that fills up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from orders.draw import OrderSpec
from orders.statistics import order_statistics
from util.animation import save_animation
from util.plots import save_figure

TITLES = {
    "lpd": "Locality-aware",
    "lpd_near_only": "Near context only",
    "lpd_far_only": "Far apart only",
    "raster": "Raster",
    "random": "Random",
    "halton": "Halton (Halton-MaskGIT)",
    "checkerboard": "Progressive checkerboard",
    "par": "Region-parallel (PAR)",
    "zipar": "Diagonal (ZipAR)",
    "nar": "From a corner (NAR)",
}

_STATES = {
    "not known yet": "#f4f4f4",
    "known": "#c3c8cf",
    "generated now, next to a known token": "#1b9e77",
    "generated now, no known neighbour": "#f0a30a",
}
_CLOSE = "#d7191c"
_STEPS = plt.get_cmap("viridis").with_extremes(bad=_STATES["not known yet"], over=_CLOSE)


@dataclass(frozen=True)
class SteppedOrder:
    """One order cut into steps, to be drawn."""

    spec: OrderSpec
    cells: np.ndarray
    """Raster indices in generation order (L,)."""

    def steps(self) -> np.ndarray:
        """The step, 1 … n, that generates each cell: int (h, w)."""
        sizes = self.spec.group_sizes
        steps = np.empty(len(self.cells), int)
        steps[self.cells] = np.repeat(np.arange(len(sizes)), sizes) + 1
        return steps.reshape(self.spec.grid)

    def snapshot(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """At ``step``: cells (h, w) unknown 0, known 1, now with a known neighbour 2, now without one 3; and the pairs
        of cells (k, 2, 2), as (x, y), that are generated at once although they repel each other."""
        steps = self.steps()
        known, now = steps < step, steps == step
        near = np.lib.stride_tricks.sliding_window_view(np.pad(known, 1), (3, 3)).any(axis=(2, 3))
        cells = np.argwhere(now)
        distances = np.abs(cells[:, None] - cells[None]).max(axis=2)
        pairs = np.argwhere(np.triu(distances <= self.spec.largest_repulsion, 1))
        return np.where(now, np.where(near, 2, 3), known), cells[pairs][:, :, ::-1]


def _draw_cells(axes: Axes, values: np.ndarray, **colours: Any) -> Any:
    """Draw numbers (h, w) as cells: column x spans x … x + 1."""
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_axis_off()
    return axes.pcolormesh(values, edgecolors="white", linewidth=0.6, **colours)


def _draw_steps(axes: Axes, order: SteppedOrder) -> Any:
    return _draw_cells(axes, order.steps(), cmap=_STEPS, vmin=1, vmax=len(order.spec.group_sizes))


def _save(figure: plt.Figure, path: Path) -> None:
    save_figure(figure, path)
    plt.close(figure)


def order_figure(order: SteppedOrder) -> Figure:
    """A grid of cells in the colour, and where there is room the number, of the step that generates them."""
    (h, w), last = order.spec.grid, len(order.spec.group_sizes)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    mesh = _draw_steps(axes, order)
    if max(h, w) <= 20:
        for (row, col), step in np.ndenumerate(order.steps()):
            color = "white" if step < 0.65 * last else "black"
            axes.text(col + 0.5, row + 0.5, str(step), ha="center", va="center", size=120 / max(h, w), color=color)
    figure.colorbar(mesh, label="step that generates the token", shrink=0.8, ticks=MaxNLocator(integer=True))
    axes.set_title(f"{TITLES[order.spec.kind]}: {h}×{w} tokens in {last} steps")
    return figure


def draw_order(path: Path, order: SteppedOrder) -> None:
    """Write the figure of an order."""
    save_figure(order_figure(order), path)


def draw_comparison(path: Path, orders: Sequence[SteppedOrder]) -> None:
    """Small multiples: for each order when each token is generated, and what one early step knows.

    Below are means over 400 orders of the kind. All have the same group sizes.
    """
    spec = orders[0].spec
    sizes, (h, w), repulsion = spec.group_sizes, spec.grid, spec.largest_repulsion
    # The first step that knows an eighth of the tokens: early enough for context to be scarce.
    step = min(len(sizes), int(np.searchsorted(np.cumsum(sizes), sum(sizes) / 8)) + 2)
    columns = min(3, len(orders))
    rows = -(-len(orders) // columns)
    figure = plt.figure(figsize=(5.2 * columns, 3.15 * rows + 1.1), layout="constrained")
    panels = figure.subfigures(rows, columns, squeeze=False)
    for panel, order in zip(panels.flat, orders, strict=False):
        left, right = panel.subplots(1, 2)
        _draw_steps(left, order)
        states, pairs = order.snapshot(step)
        _draw_cells(right, states, cmap=ListedColormap(list(_STATES.values())), vmin=0, vmax=3)
        right.add_collection(LineCollection(list(pairs + 0.5), colors=_CLOSE))
        means = order_statistics(order.spec.draw(np.arange(400)), sizes, (h, w), repulsion).overall()
        panel.suptitle(TITLES[order.spec.kind], weight="bold" if order.spec.kind == "lpd" else "normal")
        panel.supxlabel(
            f"known neighbour {means['near_context']:.0%}   ·   pairs too close {means['close_pairs']:.1%}", fontsize=10
        )
    figure.suptitle(
        f"{len(sizes)} steps on {h}×{w} tokens. "
        f"Left: when each token is generated, early (dark) to late (bright). "
        f"Right: step {step}, {sum(sizes[: step - 1])} tokens known, {sizes[step - 1]} generated at once."
    )
    legend = _STATES | {f"generated at once within distance {repulsion}": _CLOSE}
    handles = [Patch(color=color, label=label) for label, color in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    _save(figure, path)


def animate(path: Path, orders: Sequence[SteppedOrder], milliseconds: int = 450) -> None:
    """A GIF of the orders side by side, a frame per step: cells in the colour of their step, the newest in red."""
    sizes, last = orders[0].spec.group_sizes, len(orders[0].spec.group_sizes)
    size = 3.4 * len(orders), 4.0
    figure, axes = plt.subplots(1, len(orders), figsize=size, dpi=75, squeeze=False, layout="constrained")
    meshes, frames = [], []
    for axis, order in zip(axes.flat, orders, strict=True):
        axis.set_title(TITLES[order.spec.kind])
        meshes.append(_draw_steps(axis, order))
    for step in range(1, last + 2):
        for mesh, order in zip(meshes, orders, strict=True):
            steps = order.steps()
            mesh.set_array(np.ma.masked_array(np.where(steps == step, last + 1, steps), steps > step))
        done = min(step, last)
        figure.suptitle(f"step {done} of {last} · {sum(sizes[:done])} of {sum(sizes)} tokens")
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
        frames.append(Image.fromarray(pixels.copy()))
    plt.close(figure)
    save_animation(path, frames, milliseconds)
