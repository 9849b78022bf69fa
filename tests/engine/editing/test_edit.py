"""Editing: what is known stays, the rest is generated once; nothing known is ordinary generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.editing.edit import blend, edit
from engine.image_generator import ImageGenerator
from tests.helpers.holes import holes
from tests.helpers.tiny_generator import NAMES, exact_generator, write_model
from util.errors import UserError

GRID, L = 6, 36


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> ImageGenerator:
    return exact_generator(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def codes(generator: ImageGenerator) -> torch.Tensor:
    return torch.randint(12, (L,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", holes(GRID))
@pytest.mark.parametrize("variants", [1, 3])
def test_known_codes_stay_and_the_rest_is_generated(
    generator: ImageGenerator, codes: torch.Tensor, name: str, variants: int
) -> None:
    hole = holes(GRID)[name]
    edited = edit(generator, codes, hole, 2, variants=variants, steps=8, cfg=3.0)
    assert edited.codes.shape == (variants, L)
    assert edited.images.shape == (variants, 24, 24, 3)
    known = torch.from_numpy(~hole.ravel())
    assert (edited.codes[:, known] == codes[known]).all()
    assert edited.known == int(known.sum())
    assert (edited.images == generator.decode_pixels(edited.codes)).all()
    for order in edited.orders[:, edited.known :]:
        assert sorted(order) == np.flatnonzero(hole).tolist()


def test_nothing_known_is_ordinary_generation(generator: ImageGenerator, codes: torch.Tensor) -> None:
    edited = edit(generator, codes, np.ones((GRID, GRID), bool), 3, variants=2, steps=8, seed=5, cfg=3.0)
    ordinary = generator.generate(["date", 3], steps=8, seed=5, cfg=3.0)
    assert torch.equal(edited.codes, ordinary.codes)
    assert (edited.orders == ordinary.orders).all()
    assert edited.group_sizes == ordinary.group_sizes
    assert (edited.images == ordinary.images).all()


def test_everything_known_gives_the_codes_back(generator: ImageGenerator, codes: torch.Tensor) -> None:
    edited = edit(generator, codes, np.zeros((GRID, GRID), bool), None, variants=2)
    assert torch.equal(edited.codes, codes.expand(2, -1))


def test_a_variant_follows_from_the_seed_and_its_number(generator: ImageGenerator, codes: torch.Tensor) -> None:
    """Whatever comes beside it; another seed or class is another picture."""
    hole = holes(GRID)["all but one cell"]
    whole = edit(generator, codes, hole, 1, variants=4, seed=2, cfg=2.0).codes
    assert torch.equal(edit(generator, codes, hole, 1, variants=4, seed=2, cfg=2.0).codes, whole)
    last = edit(generator, codes, hole, 1, variants=2, numbers=[3, 1], seed=2, cfg=2.0).codes
    assert torch.equal(last, whole[[3, 1]])
    assert len(set(map(tuple, whole.tolist()))) == 4
    for label, seed, cfg in ((1, 3, 2.0), (0, 2, 2.0), (None, 2, 1.0)):
        other = edit(generator, codes, hole, label, variants=4, seed=seed, cfg=cfg).codes
        assert not torch.equal(other, whole)


def test_each_variant_may_have_codes_of_its_own(generator: ImageGenerator, codes: torch.Tensor) -> None:
    hole, own = holes(GRID)["rows"], torch.stack([codes, (codes + 1) % 12])
    edited = edit(generator, own, hole, 1, variants=2).codes
    assert torch.equal(edited[0], edit(generator, codes, hole, 1).codes[0])
    known = torch.from_numpy(~hole.ravel())
    assert (edited[:, known] == own[:, known]).all()


def test_a_picture_of_any_size_is_edited_by_its_middle(tmp_path: Path) -> None:
    """The codes are those that the tokenizer gives the crop."""
    generator = ImageGenerator(*write_model(tmp_path), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (61, 90, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels, "RGBA")
    crop = generator.crop(picture)
    assert crop.size == (24, 24)
    assert torch.equal(generator.encode(picture), generator.encode(crop))
    expected = generator.tokenizer.encode(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 127.5 - 1)
    assert torch.equal(generator.encode(crop), expected[0])
    with pytest.raises(UserError, match="has 90×23 pixels"):
        generator.encode(picture.resize((90, 23)))


def test_known_pixels_stay_and_new_ones_fade_in() -> None:
    before, after = Image.new("RGB", (24, 24), (0, 0, 0)), Image.new("RGB", (24, 24), (200, 100, 40))
    hole = np.zeros((GRID, GRID), bool)
    hole[:, 3:] = True
    hard = np.asarray(blend(before, after, hole, feather=0))
    assert (hard[:, :12] == 0).all()
    assert (hard[:, 12:] == (200, 100, 40)).all()
    soft = np.asarray(blend(before, after, hole, feather=4)).astype(int)
    assert (soft[:, :12] == 0).all()
    assert soft[0, 12:17, 0].tolist() == [40, 80, 120, 160, 200]
    assert (soft[:, 17:] == (200, 100, 40)).all()
    assert (np.asarray(blend(before, after, np.ones((GRID, GRID), bool))) == (200, 100, 40)).all()
    assert (np.asarray(blend(before, after, np.zeros((GRID, GRID), bool))) == 0).all()


def test_mistakes_are_named(generator: ImageGenerator, codes: torch.Tensor) -> None:
    hole = holes(GRID)["rows"]
    with pytest.raises(UserError, match=r"codes have shape \(35,\); a picture of this model has 36"):
        edit(generator, codes[:35], hole, 1)
    with pytest.raises(UserError, match=r"the hole has \(5, 6\) cells; pictures of this model have 6×6"):
        edit(generator, codes, hole[:5], 1)
    with pytest.raises(UserError, match="variants is 0"):
        edit(generator, codes, hole, 1, variants=0)
    with pytest.raises(UserError, match="cfg is not 1 but there are no labels"):
        edit(generator, codes, hole, None, cfg=2.0)
    with pytest.raises(UserError, match=f"label {len(NAMES)} is out of range"):
        edit(generator, codes, hole, len(NAMES))
    with pytest.raises(UserError, match="code 12 is out of range"):
        edit(generator, codes.clamp(max=11) * 0 + 12, hole, 1)
