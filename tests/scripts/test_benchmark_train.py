"""The training benchmark runs on a CPU with a tiny model and reports what it should."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import scripts.benchmark_train
from util.errors import UserError

TINY = ("--model", "lpd_debug", "--img_size", "64", "--batch_size", "2", "--device", "cpu", "--steps", "2")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_train", *map(str, arguments)])
    scripts.benchmark_train.main()


def test_rows_and_conditions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plain and the fast loop must compute the same: their losses after all steps agree."""
    output = tmp_path / "result.json"
    run(monkeypatch, *TINY, "--warmup", "1", "--cache_images", "20", "--output", output)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(output.read_text()) == result
    plain, fast, cached = result["rows"]
    assert plain["last_loss"] == pytest.approx(fast["last_loss"], rel=1e-4)
    assert cached["last_loss"] != fast["last_loss"]
    for row in result["rows"]:
        share = row["images_per_sec"] * result["gflop_per_image"] / result["matrix_product_tflops"] / 1000
        assert row["peak_share"] == (pytest.approx(share) if share <= 1 else None)
        assert row["speed_up"] == pytest.approx(plain["median_sec_per_step"] / row["median_sec_per_step"])
        assert 0 <= row["data_wait_share"] < 1
        assert row["min_sec_per_step"] <= row["median_sec_per_step"] <= row["max_sec_per_step"]
    assert result["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert (result["attention"], result["compile"], result["dtype"]) == ("sdpa", False, "float32")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--steps", 0), "--steps is 0"),
        (("--warmup", -1), "--warmup is -1"),
        (("--attention", "flex"), "--attention flex"),
    ],
)
def test_bad_arguments_are_named(monkeypatch: pytest.MonkeyPatch, arguments: tuple, named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(monkeypatch, *TINY, *arguments)
