"""``python -m scripts.generate``: the files it writes, that batches change nothing, and what it says to mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.image_generator import ImageGenerator
from scripts.generate import main
from tests.helpers.commands import ROOT, run
from tests.helpers.tiny_generator import write_model
from util.files import sha256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


def flags(model: tuple[Path, Path], out: Path, *more: object) -> list[object]:
    return ["--pretrained_ckpt", model[0], "--vqgan_path", model[1], "--device", "cpu", "--output_dir", out, *more]


def generate(model: tuple[Path, Path], out: Path, *more: object) -> dict[str, Any]:
    assert run(main, *flags(model, out, *more)) == 0
    return json.loads((out / "pictures.json").read_text())


def test_pictures_sheet_and_record(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbered, named by class, the same as the generator's from Python; the line says what made them."""
    record = generate(model, tmp_path, "--classes", "Cedar", 0, "--each", 2, "--steps", 5, "--cfg", 3, "--seed", 7)
    output = capsys.readouterr()
    assert json.loads(output.out) == record
    assert "picture" not in output.err  # one batch: no progress bar
    names = ["000000-cedar.png", "000001-cedar.png", "000002-ash.png", "000003-ash.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "grid.png", "pictures.json"]
    assert [made["file"] for made in record["pictures"]] == names
    assert [made["class"] for made in record["pictures"]] == [2, 2, 0, 0]
    expected = ImageGenerator(*model, device="cpu")([2, 2, 0, 0], steps=5, cfg=3.0, seed=7)
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in names]
    assert all((one == np.asarray(other)).all() for one, other in zip(pixels, expected, strict=True))
    assert len(record["group_sizes"]) == 5
    assert record["settings"]["cfg"] == 3.0
    assert record["files"]["pretrained_ckpt"] == {"path": str(model[0]), "sha256": sha256(model[0])}
    assert Image.open(tmp_path / "grid.png").size[0] < 4 * 72  # two columns, not four


def test_a_long_run_is_made_in_batches_with_a_progress_bar(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers go on over batches, the last of which is smaller. In float32 a code may change by rounding."""
    common = ("--classes", *range(5), "--steps", 5)
    generate(model, tmp_path / "whole", *common)
    capsys.readouterr()
    record = generate(model, tmp_path / "batches", *common, "--batch_size", 2)
    assert "5/5" in capsys.readouterr().err
    assert [made["number"] for made in record["pictures"]] == list(range(5))
    same = [
        (tmp_path / "whole" / made["file"]).read_bytes() == (tmp_path / "batches" / made["file"]).read_bytes()
        for made in record["pictures"]
    ]
    assert sum(same) >= 4


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_moving_picture_has_a_frame_for_each_step(model: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    generate(model, tmp_path, "--classes", "elm", "--steps", 6, "--animate", kind)
    with Image.open(tmp_path / f"000000-elm.{kind}") as file:
        assert file.n_frames == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--classes", "fir"), "the model has no class 'fir'; it has ash, birch"),
        (("--classes", 5), "class 5 is out of range; the model has classes 0 to 4"),
        (("--classes", 0, "--steps", 37), "number of steps 37 must lie between 1 and the 36 tokens"),
        (("--classes", 0, "--each", 0), "--each is 0; it must be at least 1"),
        (("--classes", 0, "--animate", "mp4"), "--animate is 'mp4'; choose one of gif, webp"),
        (("--classes", 0, "--cfg", 0.5), "cfg is 0.5"),
        (("--classes", 0, "--decode_path", "graph"), "needs a CUDA GPU"),
        ((), "--classes"),
    ],
)
def test_mistakes_are_named(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...], said: str
) -> None:
    assert run(main, *flags(model, tmp_path, *more)) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_heavy_is_loaded_for_a_picture(model: tuple[Path, Path], tmp_path: Path) -> None:
    """What a picture does not need, and what takes a second to load: torch's compiler, plots, scores."""
    heavy = ("torch._dynamo", "sympy", "torchvision", "matplotlib", "scipy", "timm", "triton")
    code = (
        "import sys; from scripts.generate import main; main(); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *map(str, flags(model, tmp_path, "--classes", "ash"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
