"""The demo runs from the digits to the table and goes on where it stopped, with a few steps of everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.demo", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_demo_from_start_to_table_and_again(tmp_path: Path) -> None:
    first = demo("--quick", "--output_dir", tmp_path / "demo")
    assert first.returncode == 0, first.stderr[-3000:]
    table = (tmp_path / "demo" / "results.md").read_text()
    assert table in first.stdout
    for row in ("| raster, one by one | 64 |", "| random | 8 |", "| locality-aware | 16 |", "| real, held out |"):
        assert row in table
    for picture in ("samples.png", "orders.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 10_000

    again = demo("--quick", "--output_dir", tmp_path / "demo")
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("done before") == 7


def test_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    for arguments, named in (
        (("--output_dir", tmp_path), "something else than a demo"),
        (("--output_dir", tmp_path / "other"), "is a file"),
        (("--output_dir", tmp_path / "new", "--device", "tpu"), "tpu"),
        (("--steps", 3), "--steps"),
    ):
        result = demo(*arguments)
        assert result.returncode == 2
        assert named in result.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
