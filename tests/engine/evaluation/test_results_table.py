"""The table over several results: figures in their own columns, published beside measured, nothing invented."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.evaluation.results_table import main, markdown_table, read_results
from util.errors import UserError

PUBLISHED: dict[str, Any] = {
    "num_images": 50_000,
    "fid": 2.4123,
    "frechet_distance": 2.4123,
    "inception_score": 284.06,
    "latency_s": 0.01234,
    "throughput_images_per_sec": 501.26,
    "images_per_sec": 433.3,
    "reference": {"path": "checkpoints/adm_in256_stats.npz", "sha256": "0123456789abcdef"},
    "extractor": {"name": "inception-v3-compat", "sha256": "6726825d"},
    "environment": {"device": "GPU", "world_size": 8},
    "record": {
        "recipe": "lpd_l_res256_steps20",
        "expected": {"fid": 2.4, "inception_score": 284.5, "latency_s": 0.28, "images_per_sec": 139.11},
    },
}
OWN: dict[str, Any] = {
    "num_images": 400,
    "frechet_distance": 12.5,
    "class_accuracy": 0.995,
    "images_per_sec": None,
    "extractor": {"name": "classifier-resnet18", "sha256": "00"},
    "reference": None,
    "environment": {"device": "CPU", "world_size": 1},
    "record": {},
}


def cells(table: str) -> list[dict[str, str]]:
    """Rows of a Markdown table by column title."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(set(cell) <= set("-:") for cell in lines[1])
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def write(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "results.json"


def test_published_beside_measured(tmp_path: Path) -> None:
    (row,) = cells(markdown_table(read_results(write(tmp_path / "a", PUBLISHED))))
    assert row["run"] == "lpd_l_res256_steps20"
    assert (row["FID, published"], row["FID"]) == ("2.40", "2.41")
    assert (row["IS, published"], row["IS"]) == ("284.5", "284.1")
    assert (row["latency s, published"], row["latency s"]) == ("0.280", "0.0123")
    assert (row["images/s, published"], row["images/s"], row["images/s with scoring"]) == ("139.1", "501.3", "433.3")
    assert row["statistics"] == "adm_in256_stats.npz (01234567)"
    assert row["device"] == "8 × GPU"
    assert "Fréchet distance" not in row, "the same number twice"


def test_runs_without_recipe_and_changed_recipes(tmp_path: Path) -> None:
    """A distance in other features must not stand under FID; a changed recipe must not pass for the published run."""
    changed = PUBLISHED | {"record": PUBLISHED["record"] | {"changed": {"cfg": 3.0, "num_images": 100}}}
    runs = read_results(write(tmp_path / "mine", OWN)) + read_results(write(tmp_path / "b", changed).parent)
    own, recipe = cells(markdown_table(runs))
    assert own["run"] == "mine"
    assert (own["FID"], own["FID, published"], own["Fréchet distance"]) == ("–", "–", "12.50")
    assert (own["right class"], own["features"], own["statistics"]) == ("99.5%", "classifier-resnet18", "–")
    assert (own["images/s with scoring"], own["device"]) == ("–", "CPU")
    assert recipe["run"] == "lpd_l_res256_steps20, cfg 3.0, num_images 100"
    assert recipe["Fréchet distance"] == "–"
    assert "sFID" not in own, "no run has one"


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a", OWN)
    lines = file.with_suffix(".jsonl")
    lines.write_text(json.dumps(OWN) + "\n" + json.dumps(PUBLISHED) + "\n")
    monkeypatch.setattr(sys, "argv", ["table", str(file), str(lines), "--output", str(tmp_path / "out" / "t.md")])
    main()
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "t.md").read_text() == printed
    assert [row["images"] for row in cells(printed)] == ["400", "400", "50000"]


def test_damaged_lines_are_left_out_and_odd_values_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a table that one bad line of hundreds makes impossible, and against a traceback."""
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(OWN)}\n{{half\n[]\n{json.dumps(OWN)}\n")
    assert len(read_results(path)) == 2
    assert "line 2 of" in caplog.text
    assert path.read_text().count("half") == 1
    path = tmp_path / "results.json"
    path.write_text(json.dumps(OWN | {"num_images": 3.5}))
    with pytest.raises(UserError, match=r"results\.json is truncated or damaged"):
        read_results(path)


@pytest.mark.parametrize("content", ["{", "[1]", '{"settings": {}}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(path)
    path.write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(path)
