"""The experiment on photographs: its cells, answers computed from data, time limits, and the whole recipe, tiny."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from engine.scoring import features
from experiments import cells, driver, sweep
from experiments.cells import Cell, Model
from experiments.cifar10 import page, run
from experiments.cifar10.report import REPORT
from experiments.cifar10.scales import FULL, TINY
from experiments.pages import distances
from scripts.stages import OutOfTime, Stages
from tests.helpers.commands import ROOT
from tests.helpers.commands import run as run_command
from tests.helpers.evaluation_case import toy_extractor
from tests.helpers.experiment_results import cifar10_results, hoped_for
from tests.helpers.pictures import assert_curve, assert_not_blank, ink, pixels_of
from tests.helpers.slurm_cluster import wait_until
from util.data.images import open_images, write_image_archive
from util.errors import UserError
from util.files import write_json
from util.folder_lock import FolderLock

LOAD_FEATURE_EXTRACTOR = features.load_feature_extractor
BLUE, OLIVE = (31, 119, 180), (188, 189, 34)  # of the first order in a plot, and of the last
GUIDANCE = {("lpd", order): 2.0 for order in FULL.orders}


def write_photos(path: Path, train: int, test: int) -> None:
    """Smooth colourful 40×36 pictures of two classes, as JPEG files in an image archive."""
    rng = np.random.default_rng(0)
    files, labels = [], []
    for i in range(train + test):
        noise = Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.filter(ImageFilter.GaussianBlur(2 + 4 * (i % 2))).save(file, "JPEG")
        files.append(file.getvalue())
        labels.append(i % 2)
    write_image_archive(path, files, labels, ["fine", "coarse"], [0] * train + [1] * test)


def test_every_cell_of_the_table_is_there_once() -> None:
    """Guards against a forgotten row, and a reported seed on which guidance was tuned."""
    reported = cells.table_cells(FULL, GUIDANCE, fid=False)
    assert len({cell.name for cell in reported}) == len(reported)
    table = {(cell.order, cell.steps) for cell in reported if cell.kind == "table"}
    assert table == {(order, steps) for order in FULL.orders for steps in (256, 64, 32, 20, 16, 12, 8)}
    seeds = Counter((cell.order, cell.steps) for cell in reported if cell.kind in ("table", "repeat"))
    main = [("lpd", 256), ("raster", 20), *((order, s) for order in ("lpd", "random", "halton") for s in (8, 20, 32))]
    assert all(seeds[cell] == 3 for cell in main)
    assert {cell.num_images for cell in reported} == {10_000}
    thresholds = {(cell.repulsion, cell.proximity) for cell in reported if cell.kind == "ablation"}
    assert thresholds | {(2, 1.0)} == {(r, p) for r in range(5) for p in (0.0, 1.0, 2.0)}
    assert {(cell.order, cell.steps) for cell in reported if cell.kind == "own"} == {
        ("par", 31),
        ("zipar", 46),
        ("nar", 31),
    }
    tuning = cells.tuning_cells(FULL)
    assert {cell.seed for cell in tuning}.isdisjoint({cell.seed for cell in reported})
    assert all(
        sum(cell.group_sizes()) == 256 and len(cell.group_sizes()) == cell.steps for cell in [*reported, *tuning]
    )


def test_guidance_is_chosen_per_order_from_tuning_cells_alone() -> None:
    rows = [
        {"kind": kind, "model": "lpd", "order": order, "cfg": cfg, "frechet_distance": distance}
        for order in FULL.orders
        for kind, cfg, distance in (
            ("tuning", 1.0, 3.0),
            ("tuning", 2.0, 2.0 + (order == "lpd") * 5),
            ("table", 9.0, 0),
        )
    ]
    assert cells.best_guidance(rows) == GUIDANCE | {("lpd", "lpd"): 1.0}


def verdicts(found: dict[str, Any]) -> list[bool]:
    return [holds for _, _, holds in page.answers(found["cells"])]


def test_answers_follow_the_data() -> None:
    """Guards against a page that says "holds" whatever was measured."""
    assert verdicts(cifar10_results(hoped_for)) == [True] * (1 + 2 * 5 + 1)

    def bad(cell: Cell) -> float:
        if (cell.kind, cell.repulsion) == ("ablation", 4):
            return 9.0
        return 10 + (cell.order == "lpd") * 20 / cell.steps

    found = cifar10_results(bad)
    question = "Locality-aware, 20 steps within 5 % of the Fréchet distance at 256 steps"
    assert next(page.answers(found["cells"])) == (question, "11.000 against 10.078, +9.1%", False)
    assert verdicts(found) == [False] * 12


def test_a_gain_within_the_spread_of_seeds_is_none() -> None:
    def noisy(cell: Cell) -> float:
        return 10 - 0.1 * (cell.order == "lpd") + cell.seed % 10

    found = cifar10_results(noisy)
    assert verdicts(found)[1:-1] == [False] * 10
    found["cells"] = [row for row in found["cells"] if row["kind"] != "repeat"]
    assert len(verdicts(found)) == 2  # not measured with two seeds


def test_an_unfinished_sweep_has_a_page_too(tmp_path: Path) -> None:
    """Guards against a report that works only when everything is there."""
    found = cifar10_results(hoped_for)
    for kept in (7, 60, 100):
        part = found | {"cells": found["cells"][:kept]}
        assert "| locality-aware |" in page.page(part)
        page.plot(part, tmp_path)
        assert_not_blank(tmp_path / "cifar10_quality.png")


def test_page_and_plots_are_made_from_the_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "report"
    (folder / "images").mkdir(parents=True)
    found = cifar10_results(hoped_for)
    (folder / "cifar10.json").write_text(json.dumps(found))
    REPORT.draw(folder)
    text = (folder / "cifar10.md").read_text()
    assert text.count("**holds**") == 12
    assert "| locality-aware | 10.010 ± 0.010 | 10.000 |" in text
    assert "| raster | 10.166 ± 0.010 |" in text
    assert "| random | 12.02 | 12.02 | 12.02 | 12.02 | 12.02 | 1 |" not in text  # hoped_for: 10 + 40/20
    assert "| random | 12.00 |" in text
    assert "PSNR 27.12 dB" in text
    assert "93.75% of the test photos" in text
    loss, quality = (pixels_of(folder / "images" / f"cifar10_{name}.png") for name in ("loss", "quality"))
    assert_curve(loss[:, :700], BLUE, [6.5, 6.0])  # without the legend
    assert ink(quality, BLUE, 30).sum(1).max() > 300  # locality-aware stays level
    REPORT.publish(folder, "test", tmp_path / "repository")
    assert (tmp_path / "repository" / "docs" / "cifar10.md").read_text() == text
    assert json.loads((tmp_path / "repository" / "benchmarks" / "results" / "cifar10_test.json").read_text()) == found
    found["settings"]["subset"] = 200
    (folder / "cifar10.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="--scale tiny"):
        REPORT.publish(folder, "test", tmp_path / "repository")
    for damaged in ("{", "[]", json.dumps(found | {"cells": 3}), json.dumps(found | {"trainings": {}})):
        (folder / "cifar10.json").write_text(damaged)
        assert run_command(REPORT.main, folder) == 2
        assert re.search(r"error: results .*cifar10\.json is truncated or damaged", capsys.readouterr().err)
    assert (folder / "cifar10.md").read_text() == text
    assert run_command(REPORT.main, folder, "--publish", "../x") == 2
    assert "--publish '../x' must be letters" in capsys.readouterr().err


def write_cells(out: Path, written: list[Cell], distance: float, lpd_distance: dict[float, float]) -> None:
    """Results as the sweep leaves them, of the folder's present files."""
    hashes = cells.file_hashes(out, Model())
    for cell in written:
        figure = lpd_distance.get(cell.cfg, distance) if (cell.kind, cell.order) == ("tuning", "lpd") else distance
        content = {"frechet_distance": figure, "record": dataclasses.asdict(cell) | hashes}
        (out / "eval" / cell.name).mkdir(parents=True, exist_ok=True)
        write_json(out / "eval" / cell.name / "results.json", content)


def test_cells_of_an_older_model_are_left_out(tmp_path: Path) -> None:
    """Guards against figures of two models, or of two guidance scales, averaged as if they were of two seeds."""
    for name in ("lpd/checkpoint-last.pth", "tokenizer/tokenizer.pt", "classifier.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"first")
    tuning = cells.tuning_cells(FULL)

    def table(lpd_cfg: float) -> list[Cell]:
        guidance = {("lpd", order): 1.0 for order in FULL.orders} | {("lpd", "lpd"): lpd_cfg}
        return cells.table_cells(FULL, guidance, fid=False)

    write_cells(tmp_path, tuning, 10, {2.0: 9})
    write_cells(tmp_path, table(2.0), 10, {})
    write_cells(tmp_path, table(3.0), 7, {})  # of no tuned scale
    rows = cells.finished_rows(tmp_path, FULL)
    assert len(rows) == len(tuning) + len(table(2.0))
    assert distances(rows, "lpd", 64) == [10]

    (tmp_path / "lpd" / "checkpoint-last.pth").write_bytes(b"trained again")
    assert cells.finished_rows(tmp_path, FULL) == []
    write_cells(tmp_path, tuning, 5, {3.0: 4})
    write_cells(tmp_path, [cell for cell in table(3.0) if cell.steps == 64], 5, {})
    rows = cells.finished_rows(tmp_path, FULL)
    assert distances(rows, "lpd", 64) == [5]
    assert distances(rows, "lpd", 32) == []
    of_cell = tmp_path / "eval" / tuning[0].name / "results.json"
    for change in ({"frechet_distance": "5"}, {"frechet_distance": None}, {"class_accuracy": [1]},
                   {"frechet_distance": float("nan")}, {"class_accuracy": True}):  # fmt: skip
        whole = of_cell.read_text()
        of_cell.write_text(json.dumps(json.loads(whole) | change))
        with pytest.raises(UserError, match=rf"{tuning[0].name}/results\.json is truncated or damaged"):
            cells.finished_rows(tmp_path, FULL)
        of_cell.write_text(whole)
    for name in ("tokenizer/tokenizer.pt", "classifier.pt"):
        (tmp_path / name).write_bytes(b"trained again")
        assert cells.finished_rows(tmp_path, FULL) == []
        (tmp_path / name).write_bytes(b"first")


class StagesUntil(Stages):
    """Time is up after ``calls`` looks at the clock, but not before the file ``ready`` is there."""

    def __init__(self, out: Path, calls: int, ready: Path | None = None) -> None:
        super().__init__(out)
        self.calls, self.ready = calls, ready

    def left(self) -> float:
        self.calls -= 1
        if self.calls < 0 and self.ready is not None:
            wait_until(self.ready.exists, 60, str(self.ready))
        return float(self.calls >= 0)


def test_a_stage_that_can_save_is_stopped_by_the_time_limit_and_resumes(tmp_path: Path) -> None:
    """Guards against lost work at the limit, and a stage that counts as finished because it was stopped."""
    script = tmp_path / "work.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "state = pathlib.Path(sys.argv[1])\n"
        "def stop(*_):\n"
        "    state.write_text('saved')\n"
        "    sys.exit(int(sys.argv[2]))\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "state.with_name('ready').touch()\n"
        "if not state.exists():\n"
        "    signal.alarm(60)\n"
        "    signal.pause()\n"
        "print('printed')\n"
    )
    state, output = tmp_path / "state", tmp_path / "output"

    def stages(limit: float | None) -> Stages:
        return Stages(tmp_path, limit)

    for status, error, message in (("1", UserError, "'work' ended with status 1"), ("75", OutOfTime, "can be resumed")):
        state.unlink(missing_ok=True)
        (tmp_path / "ready").unlink(missing_ok=True)
        with pytest.raises(error, match=message):
            StagesUntil(tmp_path, 1, tmp_path / "ready").command(
                "work", script, state, status, output=output, stoppable=True
            )
    assert state.read_text() == "saved"
    assert not output.exists()
    with pytest.raises(OutOfTime, match="before the stage 'work'"):
        stages(0).command("work", script, state, "75", output=output, stoppable=True)
    before = stages(None).states()["work"]["seconds"]
    stages(None).command("work", script, state, "75", output=output, stoppable=True)
    assert output.read_text() == "printed\n"
    assert stages(None).states()["work"]["seconds"] > before  # over all calls
    output.unlink()
    stages(0).command("work", script, state, "75", output=output, stoppable=True)
    assert not output.exists()  # done before
    with pytest.raises(UserError, match="'work' ended with status"):
        stages(None).command("work", tmp_path / "missing.py")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the experiment; gives its exit status and what it and its stages printed."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        return run_command(run.EXPERIMENT.main, "--device", "cpu", *arguments), *capfd.readouterr()

    return call


def test_wrong_arguments(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    write_photos(tmp_path / "photos.npz", 3, 0)
    for arguments, named in (
        (("--data", tmp_path / "photos.npz"), "has no test images"),
        (("--data", tmp_path / "nothing.npz"), "nothing.npz does not exist"),
        (("--data", tmp_path), "train is not a folder"),
        (("--data", tmp_path / "photos.npz", "--download"), "--download needs"),
        (("--data", tmp_path / "photos.npz", "--time_limit", 0), "--time_limit is 0.0"),
        (("--data", tmp_path / "photos.npz", "--time_limit", "nan"), "--time_limit is nan"),
        (("--data", tmp_path / "photos.npz", "--inception_path", tmp_path / "x.pth"), "--inception_path"),
        (("--data", tmp_path / "photos.npz", "--output_dir", tmp_path / "photos.npz"), "is a file"),
    ):
        status, _, errors = command("--output_dir", tmp_path / "out", *arguments)
        assert status == 2
        assert named in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_second_start_in_one_folder_is_refused(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos.npz", 3, 3)
    arguments = ("--data", tmp_path / "photos.npz", "--output_dir", tmp_path / "out", "--device", "cpu")
    command = [sys.executable, "-m", "experiments.cifar10.run", *map(str, arguments)]
    with FolderLock(tmp_path / "out") as lock:
        lock.acquire()
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2
    assert "another process is writing to" in second.stderr


def test_plan_needs_no_data(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    status, printed, _ = command("--data", "anything", "--plan")
    assert status == 0
    assert "table: 70 cells, 700,000 images" in printed


def command_in_process(
    self: Stages, name: str, *words: str | Path, output: Path | None = None, always: bool = False, **_: Any
) -> None:
    """Like Stages.command, without the seconds that a new process needs to import everything."""
    program, *arguments = map(str, words)
    if program == "-m":
        program = arguments.pop(0).replace(".", "/") + ".py"

    def action() -> None:
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", [program, *arguments])
            try:
                runpy.run_path(str(ROOT / program), run_name="__main__")
            except SystemExit as stop:
                if stop.code:
                    raise UserError(f"the stage '{name}' ended with status {stop.code}.") from stop
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(printed.getvalue())

    self.run(name, action, shlex.join(map(str, words)), always)


def load_with_fake_inception(name: str, *arguments: Any) -> features.FeatureExtractor:
    """Mean colours of the upper and the lower half in the place of Inception's features."""

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        colours = F.adaptive_avg_pool2d(images.float(), (2, 1)).flatten(1)
        return colours, colours

    if name != features.INCEPTION:
        return LOAD_FEATURE_EXTRACTOR(name, *arguments)
    fake: dict[str, Any] = {"name": name, "feature_dim": 6, "classes": None, "weights_hash": "00", "forward": forward}
    return dataclasses.replace(toy_extractor(), **fake)


@pytest.mark.slow
def test_recipe_from_photos_to_page_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Guards against a stage that does not fit the one before it, a repeated stage, and cells generated twice."""
    small = dataclasses.replace(
        TINY,
        flags=TINY.flags
        | {
            "tokenizer": (*TINY.flags["tokenizer"], "--steps", "8", "--eval_freq", "8"),
            "classifier": (*TINY.flags["classifier"], "--epochs", "1"),
            "lpd": (*TINY.flags["lpd"], "--epochs", "1"),
        },
        orders=("lpd", "random", "halton", "par"),
        steps=(20, 8),
        repeated=(("lpd", 20), ("random", 20), ("halton", 20)),
        num_images=10,
        eval_bsz=5,
        tuning_images=4,
        repulsions=(2, 3),
        subset=32,
    )
    monkeypatch.setattr(run, "EXPERIMENT", dataclasses.replace(run.EXPERIMENT, scales={"full": FULL, "tiny": small}))
    monkeypatch.setattr(Stages, "command", command_in_process)
    for module in (features, sweep):
        monkeypatch.setattr(module, "load_feature_extractor", load_with_fake_inception)
    write_photos(tmp_path / "photos.npz", 40, 20)
    (tmp_path / "inception.pth").touch()
    arguments: tuple[object, ...] = (
        "--scale",
        "tiny",
        "--data",
        tmp_path / "photos.npz",
        "--output_dir",
        tmp_path / "out",
    )
    arguments += ("--inception_path", tmp_path / "inception.pth")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "Stages", lambda out, _: StagesUntil(out, 1))
        status, printed, errors = command(*arguments)
    assert status == driver.OUT_OF_TIME, errors[-3000:]
    assert "before the stage 'codes'; run the same command again" in printed
    status, printed, errors = command(*arguments)
    assert status == 0, errors[-3000:]
    assert "tokenizer: done before" in printed
    assert len(open_images(f"{tmp_path}/out/subset32.npz:train", 32)) == 32
    text = (tmp_path / "out" / "report" / "cifar10.md").read_text()
    for line in ("| locality-aware | ", "| order \\ steps | 31 | 20 | 8 |", "| reference_real |", "| 3 | "):
        assert line in text
    found = json.loads((tmp_path / "out" / "report" / "cifar10.json").read_text())
    assert Counter(row["kind"] for row in found["cells"]) == {
        "tuning": 8, "table": 8, "repeat": 3, "own": 1, "ablation": 1, "fid": 8
    }  # fmt: skip
    assert all("fid" in row for row in found["cells"] if row["kind"] == "fid")
    assert found["floors"]["reference_real"]["num_images"] == found["floors"]["inception_real"]["num_images"] == 32
    assert {path.name for path in (tmp_path / "out" / "report" / "images").iterdir()} >= {
        "cifar10_quality.png", "cifar10_loss.png", "cifar10_samples_8.png"
    }  # fmt: skip

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "eval").glob("*/results.json")}
    status, printed, errors = command(*arguments)
    assert status == 0, errors[-3000:]
    assert printed.count("done before") == 10
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "eval").glob("*/results.json")}


@pytest.mark.slow
def test_the_commands_take_the_tiny_setting(tmp_path: Path) -> None:
    """Guards against flags that a stage's command refuses, and a status that gets lost between the processes."""
    write_photos(tmp_path / "photos.npz", 40, 20)
    arguments = [
        "--scale",
        "tiny",
        "--data",
        tmp_path / "photos.npz",
        "--output_dir",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    stages = ["tokenizer", "codes", "classifier", "reference", "floors", "lpd"]  # the processes of their own
    words = [sys.executable, "-m", "experiments.cifar10.run", *map(str, arguments), "--stage", *stages]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "lpd" / "checkpoint-last.json").read_text())
    assert state["args"]["epochs"] == 2
    assert state["step"] == 4
