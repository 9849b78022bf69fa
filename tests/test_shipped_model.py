"""The model that ships with the project: it loads by its folder, is small, and makes the pictures it always made."""

from __future__ import annotations

from pathlib import Path

import pytest

import engine.image_generator
from engine.image_generator import SHIPPED, ImageGenerator, default_checkpoint
from scripts import generate
from tests.helpers.commands import run
from util.errors import UserError

# Of "Tomato" and "Lemon", seed 0, 16 steps, guidance 3, raster order.
CODES = [
    [
        151, 644, 235, 663, 536, 167, 491, 182, 575, 558, 175, 397, 338, 281, 46, 989, 682, 526, 621, 337, 313, 545,
        501, 1009, 966, 501, 864, 800, 684, 516, 827, 734, 787, 990, 741, 837, 665, 602, 191, 640, 656, 946, 198,
        816, 864, 986, 837, 765, 106, 913, 441, 831, 234, 658, 575, 372, 852, 284, 570, 40, 93, 333, 425, 10,
    ],
    [
        999, 913, 838, 509, 301, 975, 535, 294, 803, 667, 550, 777, 142, 127, 280, 452, 446, 475, 593, 851, 62, 735,
        216, 262, 368, 171, 811, 274, 978, 477, 222, 280, 549, 33, 754, 784, 318, 161, 519, 111, 695, 490, 222, 683,
        703, 417, 436, 526, 976, 377, 667, 335, 805, 888, 1008, 728, 948, 147, 790, 939, 126, 987, 943, 816,
    ],
]  # fmt: skip


def test_its_codes_are_the_same_everywhere() -> None:
    """In float64, so that no processor rounds a draw to another code."""
    generator = ImageGenerator(SHIPPED, device="cpu")
    generator.model.double()
    made = generator.generate(["Tomato", "Lemon"], steps=16, cfg=3.0, seed=0)
    assert made.codes.tolist() == CODES
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
