"""What the page does, without a browser: its pictures are the generator's, its mistakes are sentences."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.image_generator import ImageGenerator
from orders.config import OrderConfig
from orders.statistics import order_statistics
from scripts.app.handlers import Handlers, mask_of_layers, png_of, shown, to_paint
from tests.helpers.pictures import assert_not_blank
from tests.helpers.tiny_generator import NAMES, write_model
from util.errors import UserError

SIZE, GRID, STRIDE = 16, 4, 4
GENERATE: dict[str, Any] = {"steps": 4, "order": "lpd", "seed": 3, "cfg": 2.0}


@pytest.fixture(scope="module")
def handlers(tmp_path_factory: pytest.TempPathFactory) -> Handlers:
    return Handlers(ImageGenerator(*write_model(tmp_path_factory.mktemp("trained"), SIZE), device="cpu"))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


def painted(*boxes: tuple[int, int, int, int], side: int = 64) -> Image.Image:
    """A mask that is white in boxes (left, top, right, bottom)."""
    mask = Image.new("L", (side, side))
    for box in boxes:
        mask.paste(255, box)
    return mask


def test_pictures_are_the_generators(handlers: Handlers) -> None:
    made, labels, line = handlers.generate(["cedar", "4"], 2, **GENERATE)
    expected = handlers.generator(["cedar", "cedar", "elm", "elm"], **GENERATE)
    assert [png_of(one) for one in made.pictures] == [png_of(one) for one in expected]
    assert labels == ["cedar", "cedar", "elm", "elm"]
    assert line.startswith("4 pictures of 16 tokens in 4 steps: ")
    assert f"{SIZE}×{SIZE} pixels from {GRID}×{GRID} tokens · {len(NAMES)} classes · CPU" in handlers.description()


def test_the_archive_has_the_pictures_and_their_settings(handlers: Handlers) -> None:
    made, labels, _ = handlers.generate(["ash", "date"], 1, **GENERATE)
    with zipfile.ZipFile(io.BytesIO(handlers.archive(made, labels, GENERATE))) as archive:
        assert archive.namelist() == ["000000-ash.png", "000001-date.png", "settings.json"]
        assert archive.read("000001-date.png") == png_of(made.pictures[1])
        settings = json.loads(archive.read("settings.json"))
    assert settings == {"model": str(handlers.generator.source), **GENERATE}


def test_a_frame_for_each_step(handlers: Handlers) -> None:
    frames, line = handlers.watch("ash", **GENERATE)
    assert len(frames) == 4
    assert len({png_of(frame) for frame in frames}) == 4
    assert line.endswith("s** for 16 tokens in 4 steps, order lpd")
    finished = shown(handlers.generator(["ash"], **GENERATE)[0], 192)
    side, gap = finished.width, 8
    last = frames[-1].crop((side + 2 * gap, gap, 2 * side + 2 * gap, gap + side))
    assert png_of(last) == png_of(finished)


def test_only_what_is_painted_changes(handlers: Handlers) -> None:
    """Also the other way round, for any size of the mask, and the same again for the same seed."""
    made, _, _ = handlers.generate(["ash"], 2, **GENERATE)
    source = handlers.take_generated(made, 1)
    assert png_of(source.picture) == png_of(made.pictures[1])
    hole = np.zeros((SIZE, SIZE), bool)
    hole[: 2 * STRIDE, STRIDE:] = True
    for side, inverted in ((64, False), (64, True), (256, False)):
        cell = side // GRID
        mask = painted((cell, 0, side, 2 * cell), side=side)
        run = (source, mask, inverted, "elm", 3, 4, True, 7)
        pictures, labels, line = handlers.edit(*run, cfg=2.0)
        assert labels == ["before", "generated anew", "elm, 1", "elm, 2", "elm, 3"]
        changed = ~hole if inverted else hole
        assert line.startswith(f"{changed.sum() // STRIDE**2} of 16 tokens generated anew in ")
        assert png_of(pictures[0]) == png_of(source.picture)
        for picture in pictures[1:]:
            assert np.array_equal(pixels(picture)[~changed], pixels(source.picture)[~changed])
            assert not np.array_equal(pixels(picture)[changed], pixels(source.picture)[changed])
        assert len({png_of(picture) for picture in pictures[2:]}) == 3
        assert [png_of(one) for one in handlers.edit(*run, cfg=2.0)[0]] == [png_of(one) for one in pictures]


def test_everything_generated_anew_is_generation(handlers: Handlers) -> None:
    made, _, _ = handlers.generate(["ash"], 1, **GENERATE)
    everything = painted((0, 0, 64, 64))
    (_, _, anew), _, _ = handlers.edit(made_source(handlers, made), everything, False, "ash", 1, 4, True, 3, cfg=2.0)
    assert png_of(anew) == png_of(made.pictures[0])


def made_source(handlers: Handlers, made: Any) -> Any:
    return handlers.take_generated(made, 0)


def test_uploads_are_cropped_and_encoded(handlers: Handlers, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)).save(tmp_path / "wide.png")
    source = handlers.take_upload(tmp_path / "wide.png")
    assert source.picture.size == (SIZE, SIZE)
    assert source.codes.tolist() == handlers.generator.encode(Image.open(tmp_path / "wide.png")).tolist()
    assert to_paint(source).size == (handlers.painted_side,) * 2 == (512, 512)
    Image.new("RGB", (SIZE - 1, 99)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="15×99 pixels"):
        handlers.take_upload(tmp_path / "small.png")


def test_layers_make_a_mask() -> None:
    layers = [Image.new("RGBA", (8, 8)) for _ in range(2)]
    layers[0].paste((232, 89, 12, 204), (0, 0, 2, 2))
    layers[1].paste((0, 0, 0, 255), (6, 6, 8, 8))
    mask = mask_of_layers(layers, 8)
    assert np.argwhere(pixels(mask) == 255).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [6, 6], [6, 7], [7, 6], [7, 7]]
    assert not pixels(mask_of_layers([], 8)).any()


def test_an_order_and_its_statistics(handlers: Handlers) -> None:
    picture, table = handlers.draw_order("halton", 8, 6, 1.0, 2, 5)
    assert_not_blank(picture)
    ours, random = (
        order_statistics(spec.draw(np.arange(100)), spec.group_sizes, (8, 8), 2).overall()
        for spec in (
            OrderConfig(order=kind, generation_steps=6, repulsion_threshold=2).for_grid(8, 5).spec
            for kind in ("halton", "random")
        )
    )
    assert "| mean over 100 orders | halton | random |" in table
    assert f"| {ours['near_context']:.1%} | {random['near_context']:.1%} |" in table
    assert f"| pairs of a step within 2 | {ours['close_pairs']:.1%} | {random['close_pairs']:.1%} |" in table
    assert "| – | – |" in handlers.draw_order("raster", 4, 16, 1.0, 1, 0)[1]  # one token per step has no pairs


def test_mistakes_are_sentences(handlers: Handlers) -> None:
    made, _, _ = handlers.generate(["ash"], 1, **GENERATE)
    source, nothing, something = made_source(handlers, made), painted(), painted((0, 0, 32, 32))
    edit = ("ash", 1, 4, True, 0)
    for run, message in (
        (lambda: handlers.generate([], 1, **GENERATE), "no class is chosen"),
        (lambda: handlers.generate(["beech"], 1, **GENERATE), "no class 'beech'; it has ash, birch"),
        (lambda: handlers.generate(NAMES, 16, **GENERATE), "80 pictures are asked for; at once there can be 1"),
        (lambda: handlers.generate(["ash"], 1, **{**GENERATE, "steps": 17}), "number of steps 17"),
        (lambda: handlers.generate(["ash"], 1, **{**GENERATE, "seed": -1}), "seed -1"),
        (lambda: handlers.generate(["ash"], 1, **{**GENERATE, "seed": None}), "the field of seed is empty"),
        (lambda: handlers.generate(["ash"], 1, **GENERATE, top_k=None), "the field of top-k is empty"),
        (lambda: handlers.watch("ash", **{**GENERATE, "steps": None}), "the field of steps is empty"),
        (lambda: handlers.watch("ash", **{**GENERATE, "steps": 65}), "at most 64 can be watched"),
        (lambda: handlers.take_generated(None, 0), "no generated picture yet"),
        (lambda: handlers.edit(None, something, False, *edit), "no picture to edit yet"),
        (lambda: handlers.edit(source, nothing, False, *edit), "nothing is painted"),
        (lambda: handlers.edit(source, painted((0, 0, 64, 64)), True, *edit), "everything is painted"),
        (lambda: handlers.edit(source, something, False, "ash", 65, 4, True, 0), "65 variants"),
        (lambda: handlers.draw_order("lpd", 4, 17, 1.0, 1, 0), "number of steps 17"),
    ):
        with pytest.raises(UserError, match=message):
            run()
