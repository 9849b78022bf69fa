"""What a cluster does to a run: kills, full disks, damaged files, signals. Nothing that was saved may be lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import pytest
import torch

from engine.training.checkpoint_writer import CheckpointWriter
from engine.training.stop import StopRequest, exit_when_told
from tests.helpers.commands import ROOT
from tests.helpers.processes import ALONE
from tests.helpers.training_case import SCHEDULES, HookedCodes, build, config, make_cache, stopped_at, train
from util.checkpoint import LAST, find_checkpoints, load_checkpoint, load_newest, save_checkpoint
from util.data.codes import MappedCodes
from util.errors import UserError
from util.signals import REQUEUE_STATUS, exit_status


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


def test_checkpoint_is_the_state_of_its_step_though_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer changes tensors in place: a write in the background must not see the next step."""
    may_write, save = Semaphore(0), torch.save

    def wait_and_save(payload: Any, file: Any) -> None:
        may_write.acquire()
        save(payload, file)

    monkeypatch.setattr("util.checkpoint.torch.save", wait_and_save)
    weights = torch.zeros(3)
    nested = {"state": {0: {"moment": torch.zeros(2)}}, "groups": [{"lr": 1.0}]}
    with CheckpointWriter(tmp_path, keep_last=1) as writer:
        writer.save({"model": {"w": weights}, "optimizer": nested, "step": 1})
        weights += 1
        nested["state"][0]["moment"] += 1  # type: ignore[index]
        assert not (tmp_path / LAST).exists()
        may_write.release()
        writer.save({"model": {"w": weights}, "optimizer": nested, "step": 2}, epoch=7)
        assert not load_checkpoint(tmp_path / LAST)["model"]["w"].any()
        assert not load_checkpoint(tmp_path / LAST)["optimizer"]["state"][0]["moment"].any()
        may_write.release()
    assert [path.name for path in find_checkpoints(tmp_path)] == [LAST, "checkpoint-7.pth"]
    assert load_checkpoint(tmp_path / LAST)["model"]["w"].tolist() == [1, 1, 1]
    assert json.loads((tmp_path / "checkpoint-7.json").read_text()) == {"step": 2}


def test_leftovers_of_a_killed_write_and_surplus_checkpoints_are_removed(tmp_path: Path) -> None:
    """Each kill would leave a file of the size of a checkpoint behind."""
    (tmp_path / ".checkpoint-last.pth.1.tmp").write_bytes(b"half")
    for name, step in ((LAST, 9), ("checkpoint-last-1.pth", 8), ("checkpoint-last-2.pth", 7)):
        save_checkpoint(tmp_path / name, {"model": {"w": torch.ones(1)}, "step": step})
    with CheckpointWriter(tmp_path, keep_last=2, start_step=9) as writer:
        writer.save({"model": {"w": torch.ones(1)}, "step": 10})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-last-1.json", "checkpoint-last-1.pth", "checkpoint-last.json", LAST]
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path)] == [10, 9]


def test_a_file_system_without_links_keeps_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    with CheckpointWriter(tmp_path, keep_last=2) as writer:
        for step in (1, 2, 3):
            writer.save({"model": {"w": torch.full((1,), step)}, "step": step}, epoch=step if step == 3 else None)
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path)] == [3, 2, 3]


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


def test_exit_statuses_and_signals_outside_the_loop() -> None:
    """75 asks the launcher to requeue; it would be wrong for Ctrl-C."""
    assert [exit_status(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == [75] * 3
    assert (exit_status(signal.SIGINT), REQUEUE_STATUS) == (130, 75)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, exit_when_told():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_further_signals_while_saving_change_nothing() -> None:
    """A launcher repeats SIGTERM; only a second Ctrl-C is a person who doesn't want to wait."""
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.agreed(ALONE)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_kill_between_two_renames_leaves_a_folder_that_can_be_resumed(tmp_path: Path) -> None:
    """`checkpoint-last.pth` and the one before it are then the same file, which renaming leaves as it is."""
    save_checkpoint(tmp_path / LAST, {"model": {"w": torch.ones(1)}, "step": 4})
    for suffix in (".pth", ".json"):
        os.link(tmp_path / f"checkpoint-last{suffix}", tmp_path / f"checkpoint-last-1{suffix}")
    with CheckpointWriter(tmp_path, keep_last=2, start_step=4) as writer:
        writer.save({"model": {"w": torch.ones(1)}, "step": 5})
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path)] == [5, 4]
    assert not list(tmp_path.glob(".*"))


def test_a_kill_before_the_readable_file_does_not_count_as_damage(tmp_path: Path) -> None:
    """The .json beside a good last state is then that of the state before; the state itself must be kept."""
    save_checkpoint(tmp_path / LAST, {"model": {"w": torch.ones(1)}, "step": 4})
    (tmp_path / "checkpoint-last.json").write_text('{"step": 3}')
    with CheckpointWriter(tmp_path, keep_last=2, start_step=4) as writer:
        writer.save({"model": {"w": torch.ones(1)}, "step": 5})
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path)] == [5, 4]


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
