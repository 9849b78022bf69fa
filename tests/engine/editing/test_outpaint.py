"""Outpainting: windows that overlap cover the canvas, each new cell generated once, the picture unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import engine.editing.outpaint
from engine.editing.edit import edit
from engine.editing.outpaint import outpaint
from engine.image_generator import ImageGenerator
from tests.helpers.tiny_generator import exact_generator
from util.errors import UserError

GRID = 6


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> ImageGenerator:
    return exact_generator(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("columns", "rows"), [(2, 1), (1, 2), (1.5, 1.5), (3, 2), (1, 1), (2.4, 1)])
def test_every_new_cell_is_generated_once_beside_known_ones(
    generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch, columns: float, rows: float
) -> None:
    codes = torch.randint(12, (GRID**2,), generator=torch.Generator().manual_seed(1))
    seen: list[np.ndarray] = []

    def recorded(*arguments: Any, **settings: Any) -> Any:
        seen.append(arguments[2].copy())
        return edit(*arguments, **settings)

    monkeypatch.setattr(engine.editing.outpaint, "edit", recorded)
    grown = outpaint(generator, codes, columns, rows, 2, variants=2, cfg=2.0)
    h, w = round(rows * GRID), round(columns * GRID)
    assert grown.codes.shape == (2, h, w)
    assert grown.hole.sum() == h * w - GRID**2
    assert (grown.codes[:, ~grown.hole] == codes).all()
    times = np.zeros((h, w), int)
    for hole, (top, left) in zip(seen, grown.windows, strict=True):
        times[top : top + GRID, left : left + GRID] += hole
        assert 0 < hole.sum() <= 0.75 * GRID**2  # in a corner a quarter is known
    assert (times == grown.hole).all()
    assert generator.decode_pixels(grown.codes).shape == (2, 4 * h, 4 * w, 3)


def test_windows_and_variants_differ_and_follow_from_the_seed(generator: ImageGenerator) -> None:
    codes = torch.zeros(GRID**2, dtype=torch.int64)
    grown = outpaint(generator, codes, 3, 1, 2, variants=2, seed=4).codes
    assert torch.equal(outpaint(generator, codes, 3, 1, 2, variants=2, seed=4).codes, grown)
    assert not torch.equal(outpaint(generator, codes, 3, 1, 2, variants=2, seed=5).codes, grown)
    assert not torch.equal(grown[0], grown[1])
    assert torch.equal(outpaint(generator, codes, 3, 1, 2, variants=1, seed=4).codes, grown[:1])


def test_mistakes_are_named(generator: ImageGenerator) -> None:
    codes = torch.zeros(GRID**2, dtype=torch.int64)
    for columns, rows in ((0.5, 1), (1, 0), (float("nan"), 1)):
        with pytest.raises(UserError, match="must be at least one each way"):
            outpaint(generator, codes, columns, rows, 1)
    for columns in (1000, float("inf")):
        with pytest.raises(UserError, match="of 6×6 tokens; that is more than 16384 tokens"):
            outpaint(generator, codes, columns, 20, 1)
