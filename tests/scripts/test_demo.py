"""The demo runs from the digits to the table and resumes where it stopped, with a few steps of everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

import scripts.demo
from orders.schedule import grid_group_sizes
from scripts.stages import OutOfTime, Stages
from tests.helpers.commands import ROOT
from tests.helpers.commands import run as run_command
from tests.helpers.pictures import assert_curve, assert_mosaic, assert_not_blank, assert_text, pixels_of
from tests.helpers.processes import holder
from util.errors import UserError


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the demo; gives its exit status and what it and its stages printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        return run_command(scripts.demo.main, "--device", "cpu", *arguments), *capfd.readouterr()

    return run


@pytest.mark.slow
def test_quick_demo_from_start_to_table_and_again(tmp_path: Path, demo: Callable[..., tuple[int, str, str]]) -> None:
    status, printed, errors = demo("--quick", "--output_dir", tmp_path / "demo")
    assert status == 0, errors[-3000:]
    table = (tmp_path / "demo" / "results.md").read_text()
    assert table in printed
    for row in ("| raster, one by one | 64 |", "| random | 8 |", "| locality-aware | 16 |", "| real, held out |"):
        assert row in table
    assert (tmp_path / "demo" / "likelihood" / "table.md").read_text() in table
    samples, orders = (pixels_of(tmp_path / "demo" / f"{name}.png") for name in ("samples", "orders"))
    assert np.array_equal(samples, pixels_of(tmp_path / "demo" / "eval" / "lpd_16" / "grid.png"))
    assert samples.shape[0] > 10 * 64  # a row for each digit, two of each
    assert_not_blank(tmp_path / "demo" / "samples.png", share=0.5)
    panel = orders[:, : orders.shape[1] // 3]
    raster = np.repeat(np.arange(16), grid_group_sizes(8, 16)).reshape(8, 8) / 15
    rows, columns = assert_mosaic(panel, np.rint(colormaps["viridis"](raster)[..., :3] * 255))
    assert_text(panel[: rows.start, columns])
    lines = [json.loads(line) for line in (tmp_path / "demo" / "lpd" / "metrics.jsonl").read_text().splitlines()]
    losses, epochs = ([line[name] for line in lines] for name in ("loss", "epoch"))
    assert_curve(pixels_of(tmp_path / "demo" / "loss.png")[:, :640], (31, 119, 180), losses, epochs)  # no legend

    status, printed, errors = demo("--quick", "--output_dir", tmp_path / "demo")
    assert status == 0, errors[-3000:]
    assert printed.count("done before") == 10


def test_wrong_arguments(
    tmp_path: Path, demo: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(scripts.demo, "run_stages")  # nothing is begun
    with holder(tmp_path / "taken"):
        status, _, errors = demo("--output_dir", tmp_path / "taken", "--fresh")
    assert status == 2
    assert errors.startswith(f"error: another process is writing to {tmp_path / 'taken'}")
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


def test_a_fresh_start_that_is_killed_is_no_obstacle_to_the_next(
    tmp_path: Path, demo: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a folder that is a demo's no longer, and stages that look finished without their files."""

    def fail(error: BaseException) -> Callable[..., None]:
        def function(*_: object) -> None:
            raise error

        return function

    stages = Stages(tmp_path)
    stages.run("codes", (tmp_path / "codes").mkdir, "command")
    monkeypatch.setattr(scripts.demo, "run_stages", fail(UserError("begun")))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", fail(KeyboardInterrupt()))
        assert demo("--output_dir", tmp_path, "--fresh")[0] == 130
    assert stages.path.exists()
    assert stages.states() == {}
    assert demo("--output_dir", tmp_path)[2] == "error: begun\n"
    assert (tmp_path / "codes").exists()
    assert demo("--output_dir", tmp_path, "--fresh")[2] == "error: begun\n"
    assert [path.name for path in tmp_path.iterdir()] == ["stages.json"]
    monkeypatch.setattr(scripts.demo, "run_stages", fail(OutOfTime("told to stop")))
    status, printed, errors = demo("--output_dir", tmp_path)
    assert (status, printed, errors) == (75, "\ntold to stop; run the same command again to resume.\n", "")
