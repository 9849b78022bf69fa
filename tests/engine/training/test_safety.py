"""What a cluster does to a run: kills, full disks, damaged files, signals. Nothing that was saved may be lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.training.checkpoint_writer import CheckpointWriter
from engine.training.stop import StopRequest, exit_when_told
from tests.helpers.commands import ROOT
from tests.helpers.processes import ALONE
from tests.helpers.training_case import SCHEDULES, HookedCodes, build, config, make_cache, stopped_at, train
from util.checkpoint import LAST, find_checkpoints, load_checkpoint, load_newest
from util.data.codes import MappedCodes
from util.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "codes")


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "kills"), [(1, 20), (2, 4)])
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, world_size: int, kills: int) -> None:
    """kill -9, most often in the middle of a write: the weights and losses are those of an uninterrupted run."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "interrupted_runs.py"), str(tmp_path / "runs")]
    result = subprocess.run([*command, str(world_size), str(kills)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["killed"] == kills
    assert report["runs"] >= 1
    assert report["in_a_write"] >= max(1, kills // 20)
    assert report["wrong"] == []


class FullDisk:
    """In place of torch.save: half a file, then an error, in the saves of some steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
        self.steps, self.save = steps, torch.save
        self.saved: list[int] = []
        monkeypatch.setattr("util.checkpoint.torch.save", self)

    def __call__(self, payload: dict[str, Any], file: Any) -> None:
        self.saved.append(payload["step"])
        if payload["step"] in self.steps:
            file.write(b"half a checkpoint")
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 - as torch's writer has it
        self.save(payload, file)


def test_full_disk_keeps_the_old_checkpoint_and_training_continues(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(monkeypatch, steps=[10])
    folder = tmp_path / "run"
    assert train(build(), MappedCodes(cache), SCHEDULES, config(folder), ALONE) is None
    assert disk.saved == [5, 10, 15]
    assert "NOT SAVED: step 10" in caplog.text
    assert "No space left" in caplog.text
    steps = [load_checkpoint(path)["step"] for path in find_checkpoints(folder)]
    assert steps == [15, 5]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_that_cannot_save_its_end_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """Exit status 0, or the one that requeues, would claim that everything is on disk."""
    FullDisk(monkeypatch, steps=[12] if stopped else [15])
    folder = tmp_path / "run"
    data = stopped_at(cache, 12) if stopped else MappedCodes(cache)
    with pytest.raises(UserError, match=r"ends without its last state.*No space left"):
        train(build(), data, SCHEDULES, config(folder), ALONE)
    assert load_checkpoint(folder / LAST)["step"] == 10


def test_nothing_is_saved_of_a_model_that_is_no_longer_finite(cache: Path, tmp_path: Path) -> None:
    """Between two lines of the log a checkpoint could be written from weights that are NaN already."""
    model, folder = build(), tmp_path / "run"
    data = HookedCodes(cache, 4, lambda: torch.nn.init.constant_(model.norm.bias, float("inf")))
    settings = config(folder, save_last_steps=1, log_freq=1000)
    with pytest.raises(FloatingPointError, match="step 4"):
        train(model, data, SCHEDULES, settings, ALONE)
    checkpoint = load_checkpoint(folder / LAST)
    assert checkpoint["step"] == 3
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    rows = json.loads((folder / "nonfinite-rank0.json").read_text())["samples"]
    order = np.random.default_rng([0, 0]).permutation(40)
    assert rows == order[24:32].tolist()  # the fourth batch


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(cache: Path, tmp_path: Path) -> None:
    """The run is resumed from there to the same end; the damaged file doesn't push the good one out."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train(build(), MappedCodes(cache), SCHEDULES, config(whole, save_last_steps=2, keep_last=3), ALONE)
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(whole)] == [15, 14, 12]

    data = stopped_at(cache, 9)
    settings = config(folder, save_last_steps=2, keep_last=3)
    assert train(build(), data, SCHEDULES, settings, ALONE) == signal.SIGTERM
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(folder)] == [9, 8, 6]
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-1000])
    newest = load_newest(folder)
    assert newest is not None
    assert (newest[0].name, newest[1]["step"]) == ("checkpoint-last-1.pth", 8)

    with CheckpointWriter(folder, keep_last=3, start_step=8) as writer:
        writer.save(load_checkpoint(newest[0]) | {"step": 10})
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(folder)] == [10, 8, 6]

    model = build()
    model.load_state_dict(newest[1]["model"])
    assert train(model, MappedCodes(cache), SCHEDULES, settings, ALONE, resume=newest[1]) is None
    expected = load_checkpoint(whole / LAST)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in load_checkpoint(folder / LAST)["model"].items())


def test_max_steps_saves_and_can_be_resumed(cache: Path, tmp_path: Path) -> None:
    """A one-step test run evaluates nothing, and what it did counts: learning rates and data are those of the run."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train(build(), MappedCodes(cache), SCHEDULES, config(whole), ALONE)

    def never(*arguments: Any) -> None:
        raise AssertionError

    for steps in (1, 5, 5):
        newest, model = load_newest(folder) if folder.exists() else None, build()
        if newest is not None:
            model.load_state_dict(newest[1]["model"])
        settings = config(folder, max_steps=steps, sample_freq=1, eval_freq=1)
        resume = newest and newest[1]
        assert (
            train(model, MappedCodes(cache), SCHEDULES, settings, ALONE, resume=resume, evaluate=never, draw_grid=never)
            is None
        )
        assert load_checkpoint(folder / LAST)["step"] == steps
    model.load_state_dict(load_checkpoint(folder / LAST)["model"])
    resume = load_checkpoint(folder / LAST)
    train(model, MappedCodes(cache), SCHEDULES, config(folder), ALONE, resume=resume)
    expected = load_checkpoint(whole / LAST)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in load_checkpoint(folder / LAST)["model"].items())


def test_a_peak_below_min_lr_is_kept(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The published recipes on few GPUs: a cosine must not rise from the peak to min_lr."""
    settings = config(tmp_path / "run", lr=1e-3, min_lr=1e-2, log_freq=1)
    train(build(), MappedCodes(cache), SCHEDULES, settings, ALONE)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates[5:] == [1e-3] * 10
    assert "below --min_lr 0.01" in caplog.text


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_signal_after_the_last_agreement_ends_the_run_before_evaluating(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """An evaluation takes longer than a cluster waits; everything is saved by then."""

    def never(*arguments: Any) -> None:
        raise AssertionError

    steps = 5 * epochs
    settings = config(tmp_path / "run", epochs=epochs, eval_freq=epochs)
    monkeypatch.setattr(StopRequest, "agreed", lambda self, dist: False)  # it was asked just before
    data = stopped_at(cache, steps)
    with pytest.raises(SystemExit) as caught, exit_when_told():
        train(build(), data, SCHEDULES, settings, ALONE, evaluate=never)
    assert caught.value.code == 75
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == steps


def test_a_checkpoint_does_not_stay_in_memory(cache: Path, tmp_path: Path) -> None:
    train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path / "run", max_steps=2), ALONE)
    resume = load_checkpoint(tmp_path / "run" / LAST)
    left = weakref.ref(next(iter(resume["model"].values())))
    alive: list[bool] = []
    data = HookedCodes(cache, 1, lambda: alive.append(left() is not None))
    train(build(), data, SCHEDULES, config(tmp_path / "run"), ALONE, resume=resume)
    assert alive == [False]


def test_fewer_epochs_than_the_checkpoint_has(cache: Path, tmp_path: Path) -> None:
    """It would be reported as finished, with the learning rates of another schedule."""
    train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path / "run"), ALONE)
    resume = load_checkpoint(tmp_path / "run" / LAST)
    with pytest.raises(UserError, match="--epochs is 2, but the checkpoint was saved after 3 epochs"):
        train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path / "run", epochs=2), ALONE, resume=resume)
