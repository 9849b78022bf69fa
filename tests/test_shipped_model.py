"""The model that ships with the project: it loads by its folder, is small, and makes the pictures it always made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import engine.image_generator
from engine.image_generator import SHIPPED, ImageGenerator, default_checkpoint
from scripts import generate
from tests.helpers.commands import run
from util.errors import UserError

# Of "Tomato" and "Lemon", seed 0, 20 steps, guidance 6, temperature 0.85: the first row of each, and all 512 as
# little-endian int32.
FIRST_ROWS = [
    [218, 469, 447, 172, 188, 212, 172, 333, 456, 169, 88, 397, 19, 279, 46, 341],
    [73, 350, 404, 404, 404, 350, 350, 404, 151, 151, 404, 151, 151, 73, 350, 452],
]
SHA256 = "b2836b103523b58801cd75c7f5262ad0e6bfe5e005554f7aafaf258b399463d5"


def test_its_codes_are_the_same_everywhere() -> None:
    """In float64, so that no processor rounds a draw to another code."""
    generator = ImageGenerator(SHIPPED, device="cpu")
    generator.model.double()
    made = generator.generate(["Tomato", "Lemon"], steps=20, seed=0, cfg=6.0, temperature=0.85)
    assert made.codes[:, :16].tolist() == FIRST_ROWS
    assert hashlib.sha256(made.codes.numpy().astype("<i4").tobytes()).hexdigest() == SHA256
    red, green, blue = made.images[0].mean((0, 1))
    assert red > 2 * max(green, blue), "tomatoes are red"


def test_it_is_small_and_plain_data() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 10e6
    assert {path.name for path in SHIPPED.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.safetensors",
    }  # fmt: skip
    assert "MIT" in (SHIPPED / "README.md").read_text()


def test_it_is_the_model_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where no demo was trained
    assert default_checkpoint() == SHIPPED
    out = tmp_path / "pictures"
    flags = ("--each", 2, "--steps", 4, "--device", "cpu", "--output_dir", out)
    assert run(generate.main, "--classes", "Tomato", *flags) == 0
    assert len(list(out.glob("*-Tomato.png"))) == 2
    assert run(generate.main, "--classes", "Tomatoe", *flags) == 2
    assert "produce: the model has no class 'Tomatoe'" in capsys.readouterr().err
    monkeypatch.setattr(engine.image_generator, "SHIPPED", tmp_path / "gone")
    with pytest.raises(UserError, match=r"bash scripts/demo\.sh"):
        default_checkpoint()
