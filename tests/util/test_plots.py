"""Plots of a run: the curve is that of the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.helpers.pictures import assert_curve, assert_text, ink, pixels_of
from util.plots import plot_attention, plot_curves

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_curves_are_those_of_the_figures(tmp_path: Path) -> None:
    """Guards against an empty axis and swapped axes."""
    losses, level = [4.0, 2.0, 1.5, 3.0], 2.8
    curves = {"loss": ([0.5, 1.0, 1.5, 2.0], losses), "guessing": ([0.5, 2.0], [level, level])}
    plot_curves(tmp_path / "loss.png", curves, "epoch", "nats")
    pixels = pixels_of(tmp_path / "loss.png")
    assert_curve(pixels[:, :700], BLUE, losses)  # without the legend
    assert_text(pixels[:, :40])
    curve = np.argwhere(ink(pixels[:, :700], BLUE, 8))[:, 0]
    guessing = ink(pixels, ORANGE, 8).sum(1).argmax()
    height = (curve.max() - guessing) / (curve.max() - curve.min())
    assert abs(height - (level - 1.5) / (4 - 1.5)) < 0.03


def test_attention_has_a_panel_per_layer(tmp_path: Path) -> None:
    """Guards against panels in another order: layer 1 falls, layer 2 is even."""
    even = [0.1, 0.1, 0.1]
    layers = [[[0.4, 0.04, 0.004]] * 2, [even] * 2, [even] * 2]
    plot_attention(tmp_path / "attention.png", [1, 2, 3], layers, even, "title")
    pixels = pixels_of(tmp_path / "attention.png")
    heights = [np.ptp(np.argwhere(ink(part, BLUE, 8))[:, 0]) for part in np.array_split(pixels[:-60, 70:], 3, axis=1)]
    assert heights[0] > 100
    assert max(heights[1:]) < 10
