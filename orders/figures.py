"""Figures of orders: which step generates which token, what a step knows, and a grid that fills up."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from orders.draw import OrderSpec
from util.errors import UserError
from util.files import atomic_write

TITLES = {
    "lpd": "Locality-aware (ours)",
    "lpd_near_only": "Ours, near context only",
    "lpd_far_only": "Ours, far apart only",
    "raster": "Raster",
    "random": "Random",
    "halton": "Halton (Halton-MaskGIT)",
    "par": "Region-parallel (PAR)",
    "zipar": "Diagonal (ZipAR)",
    "nar": "From a corner (NAR)",
}

_STEPS = "viridis"
_UNKNOWN, _KNOWN, _NEAR, _ALONE, _CLOSE = "#f4f4f4", "#c3c8cf", "#1b9e77", "#f0a30a", "#d7191c"
_STATES = ListedColormap([_UNKNOWN, _KNOWN, _NEAR, _ALONE])


@dataclass(frozen=True)
class SteppedOrder:
    """One order cut into steps, to be drawn."""

    spec: OrderSpec
    cells: np.ndarray
    """Raster indices in generation order (L,)."""

    @classmethod
    def of(cls, spec: OrderSpec, index: int) -> SteppedOrder:
        """The order of this number."""
        if index < 0:
            raise UserError(f"order number {index} must be 0 or more.")
        return cls(spec, spec.draw(np.array([index]))[0])

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
        padded = np.pad(known, 1)
        h, w = self.spec.grid
        near = np.any([padded[dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)], axis=0)
        states = np.where(now, np.where(near, 2, 3), np.where(known, 1, 0))
        cells = np.argwhere(now)
        distances = np.abs(cells[:, None] - cells[None]).max(axis=2)
        i, j = np.nonzero(np.triu(distances <= self.spec.repulsion_threshold, 1))
        return states, np.stack([cells[i], cells[j]], axis=1)[:, :, ::-1]


def _frame(axes: Axes, grid: tuple[int, int]) -> None:
    h, w = grid
    axes.set_xticks(np.arange(w + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(h + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_steps(axes: Axes, order: SteppedOrder) -> None:
    axes.imshow(order.steps(), cmap=_STEPS, norm=Normalize(1, len(order.spec.group_sizes)))
    _frame(axes, order.spec.grid)


def _draw_snapshot(axes: Axes, order: SteppedOrder, step: int) -> None:
    states, pairs = order.snapshot(step)
    axes.imshow(states, cmap=_STATES, vmin=0, vmax=3)
    _frame(axes, order.spec.grid)
    axes.add_collection(LineCollection(list(pairs), colors=_CLOSE, linewidths=1.4))


def _save(figure: plt.Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=110)
    plt.close(figure)


def draw_order(path: Path, order: SteppedOrder) -> None:
    """A grid of cells in the colour, and where there is room the number, of the step that generates them."""
    h, w = order.spec.grid
    figure, axes = plt.subplots(figsize=(7, 6.2), layout="constrained")
    _draw_steps(axes, order)
    last = len(order.spec.group_sizes)
    if max(h, w) <= 20:
        for (row, col), step in np.ndenumerate(order.steps()):
            color = "white" if step < 0.65 * last else "black"
            axes.text(col, row, str(step), ha="center", va="center", fontsize=120 / max(h, w), color=color)
    figure.colorbar(axes.images[0], label="step that generates the token", shrink=0.8, ticks=MaxNLocator(integer=True))
    axes.set_title(f"{TITLES[order.spec.kind]}: {h}×{w} tokens in {last} steps", fontsize=13)
    _save(figure, path)


def draw_comparison(path: Path, orders: Sequence[SteppedOrder], overall: Sequence[dict[str, float]]) -> None:
    """Small multiples: for each order when each token is generated, and what one early step knows.

    ``overall`` holds the :meth:`OrderStatistics.overall` of each. All have the same group sizes.
    """
    sizes, (h, w) = orders[0].spec.group_sizes, orders[0].spec.grid
    repulsion = orders[0].spec.repulsion_threshold
    # The first step that knows an eighth of the tokens: early enough for context to be scarce.
    step = min(len(sizes), int(np.searchsorted(np.cumsum(sizes), sum(sizes) / 8)) + 2)
    known = sum(sizes[: step - 1])
    columns = min(3, len(orders))
    rows = -(-len(orders) // columns)
    figure = plt.figure(figsize=(5.2 * columns, 3.15 * rows + 1.1), layout="constrained")
    panels = figure.subfigures(rows, columns, wspace=0.04, hspace=0.03, squeeze=False)
    for panel, order, means in zip(panels.flat, orders, overall, strict=False):
        left, right = panel.subplots(1, 2)
        _draw_steps(left, order)
        _draw_snapshot(right, order, step)
        ours = order.spec.kind == "lpd"
        panel.suptitle(TITLES[order.spec.kind], fontsize=13, fontweight="bold" if ours else "normal")
        panel.supxlabel(
            f"known neighbour {means['near_context']:.0%}   ·   pairs too close {means['close_pairs']:.1%}",
            fontsize=10,
            fontweight="bold" if ours else "normal",
        )
        if ours:
            panel.set_facecolor("#eef6f2")
    figure.suptitle(
        f"{len(sizes)} steps on {h}×{w} tokens. "
        f"Left: when each token is generated, early (dark) to late (bright). "
        f"Right: step {step}, {known} tokens known, {sizes[step - 1]} generated at once.",
        fontsize=12,
    )
    figure.legend(
        handles=[
            Patch(color=_KNOWN, label="known"),
            Patch(color=_NEAR, label="generated now, next to a known token"),
            Patch(color=_ALONE, label="generated now, no known neighbour"),
            Line2D([], [], color=_CLOSE, label=f"generated at once within distance {repulsion}"),
        ],
        loc="outside lower center",
        ncols=4,
        fontsize=11,
        frameon=False,
    )
    _save(figure, path)


def animate(path: Path, orders: Sequence[SteppedOrder], milliseconds: int = 450) -> None:
    """A GIF of the orders side by side, a frame per step: cells in the colour of their step, the newest in red."""
    sizes = orders[0].spec.group_sizes
    last = len(sizes)
    colors = plt.get_cmap(_STEPS)(Normalize(1, last)(np.arange(last + 1)))
    colors[0] = matplotlib.colors.to_rgba(_UNKNOWN)
    figure, axes = plt.subplots(1, len(orders), figsize=(3.4 * len(orders), 4.0), squeeze=False, layout="constrained")
    images = []
    for axis, order in zip(axes.flat, orders, strict=True):
        images.append(axis.imshow(np.zeros((*order.spec.grid, 4)), interpolation="nearest"))
        _frame(axis, order.spec.grid)
        axis.set_title(TITLES[order.spec.kind], fontsize=12)
    frames = []
    for step in range(1, last + 2):
        for image, order in zip(images, orders, strict=True):
            steps = order.steps()
            shown = colors[np.where(steps <= step, steps, 0)]
            shown[steps == step] = matplotlib.colors.to_rgba(_CLOSE)
            image.set_data(shown)
        done = min(step, last)
        figure.suptitle(f"step {done} of {last} · {sum(sizes[:done])} of {sum(sizes)} tokens", fontsize=12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=75)
        frames.append(Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE))
    plt.close(figure)
    durations = [milliseconds] * last + [5 * milliseconds]
    with atomic_write(path) as file:
        frames[0].save(
            file, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
        )
