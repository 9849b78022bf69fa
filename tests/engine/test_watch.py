"""A decode step by step: what was known, chosen and decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.editing.edit import edit
from engine.image_generator import Generated, ImageGenerator
from engine.watch import COLOURS, KNOWN, NOW, UNKNOWN, Trace, cells_picture, frames, pictures_so_far
from tests.helpers.holes import holes
from tests.helpers.tiny_generator import exact_generator
from util.animation import save_animation

GRID, STEPS = 6, 8


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> ImageGenerator:
    return exact_generator(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def generated(generator: ImageGenerator) -> Generated:
    return generator.generate([0, 4], steps=STEPS, cfg=2.0)


def test_steps_are_the_groups_of_the_order(generator: ImageGenerator, generated: Generated) -> None:
    trace = Trace.of(generated, 1)
    assert trace.num_steps == STEPS
    assert (trace.codes.ravel() == generated.codes[1].numpy()).all()
    first = 0
    for step, size in enumerate(generated.group_sizes, 1):
        cells = generated.orders[1, first : first + size]
        assert trace.cells(step).tolist() == sorted(cells.tolist())
        states = trace.states(step).ravel()
        assert (states[cells] == NOW).all()
        assert (states[generated.orders[1, :first]] == KNOWN).all()
        assert (states[generated.orders[1, first + size :]] == UNKNOWN).all()
        first += size
        codes = trace.codes_at(step).ravel()
        assert (codes >= 0).sum() == first
        assert (codes[cells] == generated.codes[1].numpy()[cells]).all()
    assert (trace.states(0) == UNKNOWN).all()


def test_known_cells_are_there_at_the_beginning(generator: ImageGenerator, generated: Generated) -> None:
    hole = holes(GRID)["rows"]
    trace = Trace.of(edit(generator, generated.codes[0], hole, 1), 0)
    assert (trace.states(0) == np.where(hole, UNKNOWN, KNOWN)).all()
    assert len(frames(trace, pictures_so_far(trace, generator))) == trace.num_steps + 1
    everything = Trace.of(edit(generator, generated.codes[0], np.zeros_like(hole), 1), 0)
    assert everything.num_steps == 0
    assert (everything.states(0) == KNOWN).all()
    assert (pictures_so_far(everything, generator)[0] == generated.images[0]).all()


def test_pictures_so_far_end_with_the_picture(generator: ImageGenerator, generated: Generated) -> None:
    """Cells that are not known are grey; of one known code the whole picture is decoded, whatever comes later."""
    trace = Trace.of(generated, 0)
    pictures = pictures_so_far(trace, generator)
    assert pictures.shape == (STEPS + 1, 24, 24, 3)
    assert (pictures[-1] == generated.images[0]).all()
    for step in range(STEPS):
        unknown = np.kron(trace.steps > step, np.ones((4, 4))) > 0
        assert (pictures[step][unknown] == COLOURS[UNKNOWN]).all()
    cell = trace.cells(1)[0]
    flat = generator.decode_pixels(generated.codes[:1] * 0 + generated.codes[0, cell])[0]
    known = trace.steps.repeat(4, 0).repeat(4, 1) == 1
    assert (pictures[1][known] == flat[known]).all()


def test_frames_and_files(generator: ImageGenerator, generated: Generated, tmp_path: Path) -> None:
    trace = Trace.of(generated, 0)
    cells = np.asarray(cells_picture(trace, 3, 60))
    colours = np.array([COLOURS[state] for state in (UNKNOWN, KNOWN, NOW)])
    assert (cells[5::10, 5::10] == colours[trace.states(3)]).all()
    shown = frames(trace, pictures_so_far(trace, generator))
    assert len(shown) == STEPS
    right = np.asarray(shown[-1])[8 : 8 + 192, 192 + 16 : 192 + 16 + 192]
    assert (right == generated.images[0].repeat(8, 0).repeat(8, 1)).all()
    for name, kind in (("a.gif", "GIF"), ("a.webp", "WEBP")):
        save_animation(tmp_path / name, shown, 100)
        with Image.open(tmp_path / name) as file:
            assert (file.format, file.n_frames, file.size) == (kind, STEPS, shown[0].size)  # type: ignore[attr-defined]
            if kind == "WEBP":
                assert (np.asarray(file.convert("RGB")) == np.asarray(shown[0])).all()
