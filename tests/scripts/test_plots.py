"""The plots show the figures of the files that are named; what cannot be drawn is one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scripts.plots
from tests.helpers.commands import run
from tests.helpers.pictures import assert_not_blank
from tests.helpers.tiny_generator import NAMES, write_model
from util.data.codes import CacheHeader
from util.files import sha256

SETTINGS = {
    "order": "lpd", "proximity_threshold": 1.0, "repulsion_threshold": 1, "cfg": 4.0, "cfg_schedule": "linear",
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "bf16": False, "num_images": 10,
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Sequence[Any]]]:
    """The curves of every plot that is drawn."""
    plots: list[Mapping[str, Sequence[Any]]] = []
    draw = scripts.plots.plot_curves

    def record(path: Path, curves: Mapping[str, Sequence[Any]], *rest: Any, **more: Any) -> None:
        plots.append(curves)
        draw(path, curves, *rest, **more)

    monkeypatch.setattr(scripts.plots, "plot_curves", record)
    return plots


def write_run(folder: Path, lines: Sequence[dict[str, float]], vocab_size: int = 64) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train_settings.json").write_text(json.dumps({"model": {"vocab_size": vocab_size}}))
    return folder


def write_results(folder: Path, steps: int, distance: float, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    results = {
        "num_images": 10,
        "frechet_distance": distance,
        "settings": {**SETTINGS, **settings, "group_sizes": [1] * steps},
        "record": {},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "results.json"


LINES = [{"epoch": 0.5, "loss": 4.0}, {"epoch": 1.0, "loss": 3.0, "val_loss": 3.5}, {"epoch": 2.0, "loss": 2.0}]


def test_losses_of_one_run_and_of_several(tmp_path: Path, drawn: list[Mapping[str, Sequence[Any]]]) -> None:
    first = write_run(tmp_path / "first", LINES)
    other = write_run(tmp_path / "other", LINES[:1], vocab_size=32)
    assert run(scripts.plots.main, "loss", first, "--output", tmp_path / "one.png") == 0
    assert run(scripts.plots.main, "loss", first / "metrics.jsonl", other, "--output", tmp_path / "two.svg") == 0
    assert drawn[0] == {
        "training": ([0.5, 1.0, 2.0], [4.0, 3.0, 2.0]),
        "validation": ([1.0], [3.5]),
        "ln 64: guessing": ([0, 2.0], [math.log(64)] * 2),
    }
    assert {*drawn[1]} == {"first: training", "first: validation", "other: training"}  # guessing differs
    assert_not_blank(tmp_path / "one.png")
    assert (tmp_path / "two.svg").read_text().startswith("<?xml")


def test_runs_of_one_name_are_told_apart(tmp_path: Path, drawn: list[Mapping[str, Sequence[Any]]]) -> None:
    runs = [write_run(tmp_path / name / "lpd", LINES[:1]) for name in "ab"]
    scripts.plots.plot_losses(tmp_path / "loss.png", runs)
    assert [label for label in drawn[0] if "training" in label] == [f"{path}: training" for path in runs]


def test_quality_is_a_curve_per_setting_that_differs(tmp_path: Path, drawn: list[Mapping[str, Sequence[Any]]]) -> None:
    """Seeds are averaged, guidance scales are not."""
    files = [
        write_results(tmp_path / "a", 16, 2.0, seed=0),
        write_results(tmp_path / "b", 16, 4.0, seed=1),
        write_results(tmp_path / "c", 8, 5.0),
        write_results(tmp_path / "d", 8, 6.0, cfg=2.0),
        write_results(tmp_path / "e", 8, 7.0, order="random").parent,
    ]
    assert run(scripts.plots.main, "quality", *files, "--output", tmp_path / "quality.png") == 0
    assert drawn == [
        {
            "lpd, cfg 4.0": ([8, 16], [5.0, 3.0], [0.0, pytest.approx(math.sqrt(2))]),
            "lpd, cfg 2.0": ([8], [6.0], [0.0]),
            "random, cfg 4.0": ([8], [7.0], [0.0]),
        }
    ]
    assert_not_blank(tmp_path / "quality.png")


def test_attention_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By command, while decoding and over a code cache: JSON beside the picture."""
    model, tokenizer = write_model(tmp_path, img_size=16)
    output = ("--device", "cpu", "--output", tmp_path / "attention.png")
    command = (
        "attention",
        "--pretrained_ckpt",
        model,
        "--vqgan_path",
        tokenizer,
        "--num_images",
        9,
        "--steps",
        4,
        *output,
    )
    assert run(scripts.plots.main, *command, "--cfg", 2) == 0
    figures = json.loads((tmp_path / "attention.json").read_text())
    assert (figures["measured"], figures["num_images"], figures["num_queries"]) == ("while decoding", 9, 9 * 16)
    assert np.shape(figures["context"]["per_token"]) == (2, 2, len(figures["context"]["distances"]))
    assert_not_blank(tmp_path / "attention.png")

    cache = tmp_path / "codes"
    cache.mkdir()
    rng = np.random.default_rng(0)
    for name in ("codes.npy", "codes_flip.npy"):
        np.save(cache / name, rng.integers(0, 12, (5, 16)).astype(np.uint16))
    np.save(cache / "labels.npy", np.arange(5))
    header = CacheHeader(
        img_size=16, grid_size=4, num_images=5, classes=NAMES, tokenizer_sha256=sha256(tokenizer), vocab_size=12,
        source="",
    )  # fmt: skip
    for change, message in (
        ({"tokenizer_sha256": "0" * 64}, "was made with another tokenizer"),
        ({"classes": [*NAMES, "fir"]}, f"holds images of {len(NAMES) + 1} classes, the model has {len(NAMES)}."),
    ):
        (cache / "header.json").write_text(json.dumps(dataclasses.asdict(header) | change))
        assert run(scripts.plots.main, *command, "--cached_path", cache) == 2
        assert message in capsys.readouterr().err
    (cache / "header.json").write_text(json.dumps(dataclasses.asdict(header)))
    assert run(scripts.plots.main, *command, "--cached_path", cache) == 0
    figures = json.loads((tmp_path / "attention.json").read_text())
    assert (figures["measured"], figures["num_images"]) == ("in a training pass", 5)


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, results = write_run(tmp_path / "good", LINES), write_results(tmp_path / "results", 8, 1.0)
    damaged = write_run(tmp_path / "damaged", [])
    (damaged / "metrics.jsonl").write_text('{"epoch": 1')
    empty = write_run(tmp_path / "empty", [])
    picture = ("--output", tmp_path / "out.png")
    for command, message in (
        (("loss", tmp_path / "nowhere", *picture), "nowhere does not exist"),
        (("loss", damaged, *picture), "damaged/metrics.jsonl holds no losses yet"),
        (("loss", good, empty, *picture), "empty/metrics.jsonl holds no losses yet"),
        (("loss", good, "--output", "out.gif"), "must end in .png, .pdf, .svg"),
        (("loss", good, "--output", good / "metrics.jsonl" / "out.png"), "metrics.jsonl is a file"),
        (("quality", good / "train_settings.json", *picture), "holds no results"),
        (("quality", results, "--figure", "fid", *picture), "the figure fid; they have frechet_distance."),
        (("attention", "--pretrained_ckpt", "nowhere.pth", *picture), "nowhere.pth"),
        (("attention", "--pretrained_ckpt", "x", "--num_images", 0, *picture), "--num_images is 0"),
    ):
        assert run(scripts.plots.main, *command) == 2, message
        # A damaged line is said in a warning before, where messages are shown.
        *_, sentence = capsys.readouterr().err.splitlines()
        assert sentence.startswith("error: ")
        assert message in sentence
    assert not (tmp_path / "out.png").exists()
