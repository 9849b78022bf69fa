"""Orders and steps compared by one command: a cell for each pair, made once, the same random numbers in all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.evaluation import compare
from engine.image_generator import ImageGenerator
from models import build_model
from tests.engine.evaluation.test_results_table import cells
from tests.helpers.commands import run
from tests.helpers.pictures import assert_shows
from tests.helpers.tiny_models import far_from_initialisation, tiny_tokenizer
from tokenizers import save_tokenizer
from util.files import sha256


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_tokenizer(tiny_tokenizer(4, 12), tmp_path / "tokenizer.pt")
    model = build_model("lpd_debug", img_size=16, stride=4, class_num=3, vocab_size=12)
    far_from_initialisation(model, 0.3)
    content = {"model": model.state_dict(), "config": vars(model.config), "classes": ["cat", "dog", "owl"]}
    content["tokenizer_sha256"] = sha256(tmp_path / "tokenizer.pt")
    torch.save(content, tmp_path / "lpd.pth")
    return tmp_path


def command(files: Path, *flags: object) -> int:
    return run(
        compare.main, "--pretrained_ckpt", files / "lpd.pth", "--vqgan_path", files / "tokenizer.pt", "--output_dir",
        files / "out", "--feature_extractor", "none", "--num_images", 6, "--eval_bsz", 2, "--device", "cpu",
        "--decode_path", "plain", "--cfg", 2, *flags,
    )  # fmt: skip


def test_every_pair_is_made_once(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(files, "--orders", "lpd", "raster", "--steps", 4, 16) == 0
    printed = capsys.readouterr().out
    rows = cells((files / "out" / "results.md").read_text())
    assert (files / "out" / "results.md").read_text() in printed
    assert [(row["order"], row["steps"]) for row in rows] == [
        ("lpd", "4"),
        ("lpd", "16"),
        ("raster", "4"),
        ("raster", "16"),
    ]
    assert {row["checkpoint"] for row in rows} == {f"{files.name}/lpd.pth ({sha256(files / 'lpd.pth')[:8]})"}
    assert {(row["EMA"], row["guidance"]) for row in rows} == {("no", "2")}
    made = {path: path.stat().st_mtime_ns for path in (files / "out").glob("*/results.json")}
    assert len(made) == 4
    # Again, with one more: the others stand.
    assert command(files, "--orders", "lpd", "raster", "--steps", 4, 16, 8) == 0
    again = {path: path.stat().st_mtime_ns for path in (files / "out").glob("*/results.json")}
    assert len(again) == 6
    assert made.items() <= again.items()
    # With other settings none of them does.
    assert command(files, "--orders", "lpd", "--steps", 4, "--top_k", 3) == 0
    assert (files / "out" / "lpd_4" / "results.json").stat().st_mtime_ns != made[
        files / "out" / "lpd_4" / "results.json"
    ]
    assert (files / "out" / "curve.png").is_file()


def test_a_column_of_the_strip_has_one_class_and_seed(files: Path) -> None:
    assert command(files, "--orders", "lpd", "random", "--steps", 4, "--seed", 5) == 0
    generator = ImageGenerator(files / "lpd.pth", files / "tokenizer.pt", device="cpu")
    pictures = [
        np.asarray(picture)
        for order in ("lpd", "random")
        for picture in generator([0, 1, 2], 4, order=order, seed=5, cfg=2.0)
    ]
    assert_shows(files / "out" / "strip.png", pictures, columns=3)


def test_what_does_not_fit_is_refused_before_any_work(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (("--orders", "lpd", "rastre"), "--orders is 'rastre'; choose one of"),
        (("--steps", 4, 17), "17"),
        (("--steps", 0), "--steps is 0"),
        (("--vqgan_path", files / "lpd.pth"), "not a tokenizer"),
    ):
        assert command(files, *flags) == 2
        assert message in capsys.readouterr().err
        assert not list((files / "out").glob("*/*"))
