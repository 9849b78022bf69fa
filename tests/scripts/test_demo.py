"""The demo runs from the digits to the table and goes on where it stopped, with a few steps of everything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import scripts.demo
from tests.helpers.commands import ROOT
from util.cli import exit_on_user_error


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the demo; gives its exit status and what it and its stages printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["demo", "--device", "cpu", *map(str, arguments)])
        try:
            exit_on_user_error(scripts.demo.main)
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.mark.slow
def test_quick_demo_from_start_to_table_and_again(tmp_path: Path, demo: Callable[..., tuple[int, str, str]]) -> None:
    status, printed, errors = demo("--quick", "--output_dir", tmp_path / "demo")
    assert status == 0, errors[-3000:]
    table = (tmp_path / "demo" / "results.md").read_text()
    assert table in printed
    for row in ("| raster, one by one | 64 |", "| random | 8 |", "| locality-aware | 16 |", "| real, held out |"):
        assert row in table
    for picture in ("samples.png", "orders.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 10_000

    status, printed, errors = demo("--quick", "--output_dir", tmp_path / "demo")
    assert status == 0, errors[-3000:]
    assert printed.count("done before") == 9


def test_wrong_arguments(tmp_path: Path, demo: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "other").write_text("")
    for arguments, named in (
        (("--output_dir", tmp_path), "something else than a demo"),
        (("--output_dir", tmp_path / "other"), "is a file"),
        (("--output_dir", tmp_path / "new", "--device", "tpu"), "tpu"),
        (("--steps", 3), "--steps"),
    ):
        status, _, errors = demo(*arguments)
        assert status == 2
        assert named in errors.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
