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

# Of "Tomato" and "Lemon", seed 0, 20 steps, guidance 4.5: the first row of each, and all 512 as little-endian int32.
FIRST_ROWS = [
    [218, 360, 447, 397, 188, 169, 490, 80, 456, 169, 88, 397, 19, 240, 240, 328],
    [18, 87, 22, 178, 301, 503, 412, 263, 7, 249, 83, 287, 97, 127, 502, 193],
]
SHA256 = "cc18179f9ea1d215c59b43d81908ed3ee343fd0933de009c05eb07dcf324b967"


def test_its_codes_are_the_same_everywhere() -> None:
    """In float64, so that no processor rounds a draw to another code."""
    generator = ImageGenerator(SHIPPED, device="cpu")
    generator.model.double()
    made = generator.generate(["Tomato", "Lemon"], steps=20, cfg=4.5, seed=0)
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
    assert "Tomato" in capsys.readouterr().err
    monkeypatch.setattr(engine.image_generator, "SHIPPED", tmp_path / "gone")
    with pytest.raises(UserError, match=r"bash scripts/demo\.sh"):
        default_checkpoint()
