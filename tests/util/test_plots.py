"""Plots of a run: the curve is that of the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.helpers.pictures import assert_curve, assert_text, ink, pixels_of
from util.plots import plot_loss

BLUE = (31, 119, 180)


def test_loss_over_the_epochs(tmp_path: Path) -> None:
    """Guards against an empty axis, swapped axes, and a line for guessing where it does not belong."""
    losses = [4.0, 2.0, 1.5, 3.0]
    lines = [{"epoch": epoch, "loss": loss} for epoch, loss in zip([0.5, 1.0, 1.5, 2.0], losses, strict=True)]
    plot_loss(lines, tmp_path / "loss.png", vocab_size=16)
    plot_loss(lines, tmp_path / "plain.png")
    pixels = pixels_of(tmp_path / "loss.png")
    assert pixels.shape == (385, 770, 3)
    assert_curve(pixels, BLUE, losses)
    assert_text(pixels[:, :40])
    grey = [ink(pixels_of(tmp_path / name), (128, 128, 128), 8) for name in ("loss.png", "plain.png")]
    guessing = grey[0].sum(1).argmax()  # ln 16 = 2.77 is between the losses 2 and 3
    curve = np.argwhere(ink(pixels, BLUE, 8))[:, 0]
    height = (curve.max() - guessing) / (curve.max() - curve.min())
    assert abs(height - (2.7726 - 1.5) / (4 - 1.5)) < 0.03
    assert grey[0].sum(1).max() > 100 > grey[1].sum(1).max()
