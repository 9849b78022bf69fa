"""The benchmark of an evaluation runs on a CPU with a tiny model; its seconds add up and the extractor is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.scoring.features import INCEPTION_FILE
from scripts import benchmark_evaluation
from tests.helpers.commands import run

TINY = ("--model", "lpd_debug", "--img_size", 32, "--generation_steps", 2, "--device", "cpu", "--arch", "test_resnet")


@pytest.mark.slow
def test_seconds_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))  # no Inception there
    output = tmp_path / "evaluation.json"
    sizes = ("--num_images", 8, "--eval_bsz", 4)
    assert run(benchmark_evaluation.main, *TINY, *sizes, "--output", output) == 0
    result = json.loads(output.read_text())
    assert (result["extractor"], result["random_extractor_weights"]) == ("classifier-test_resnet", True)
    alone, scored, saved = result["rows"]
    assert [row["features_sec"] > 0 for row in (alone, scored, saved)] == [False, True, True]
    for row in result["rows"]:
        parts = ("generating_sec", "features_sec", "rest_of_loop_sec", "outside_loop_sec")
        assert sum(row[part] for part in parts) == pytest.approx(row["total_sec"])
        assert row["generating_sec"] > 0
        assert row["outside_loop_sec"] > 0
    assert result["images_per_sec_without_scores"] == pytest.approx(8 / scored["generating_sec"])
    assert result["images_per_sec_with_features"] == pytest.approx(
        8 / (scored["generating_sec"] + scored["features_sec"])
    )
    assert 0 < result["scoring_share_of_50000_images"] < 1
    assert 0 < result["pixels_share_of_generating"] < 1  # the tokenizer is of full size, the model is tiny


def test_bad_input_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / INCEPTION_FILE
    weights.write_bytes(b"no weights")
    for arguments, named in (
        (("--num_images", 5, "--eval_bsz", 4), "two batches of 4"),
        (("--num_images", 8, "--eval_bsz", 4, "--inception_path", weights), f"{weights} is not {INCEPTION_FILE}"),
    ):
        assert run(benchmark_evaluation.main, *TINY, *arguments) == 2
        assert named in capfd.readouterr().err
