"""Checkpoints written in the background: complete, of one step, the right number of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest
import torch

from engine.training.checkpoint_writer import CheckpointWriter
from util.checkpoint import LAST, find_checkpoints, load_checkpoint, save_checkpoint


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
    (tmp_path / "checkpoint-new.pth").write_bytes(b"complete, but not yet the last")
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


@pytest.mark.gpu
def test_checkpoint_of_a_gpu_is_the_state_of_its_step(tmp_path: Path) -> None:
    """Copies to pinned memory are asynchronous: they must be complete before the next step changes the weights."""
    weights = torch.zeros(50_000_000, device="cuda")
    with CheckpointWriter(tmp_path, keep_last=1) as writer:
        for step in (1, 2):
            writer.save({"model": {"w": weights}, "step": step})
            weights += 1
        writer.wait()
    # Not `assert (w == 1).all()`, which pytest would explain element by element.
    assert torch.equal(load_checkpoint(tmp_path / LAST)["model"]["w"], torch.ones(50_000_000))


@pytest.mark.parametrize("damaged", [False, True])
def test_on_a_full_disk_the_state_before_the_last_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Three states at once don't fit: the newest is worth more than the oldest, unless that is the only good one."""
    weights = {"w": torch.ones(1)}
    for name, step in ((LAST, 2), ("checkpoint-last-1.pth", 1)):
        save_checkpoint(tmp_path / name, {"model": weights, "step": step})
    save = torch.save

    def save_two_only(payload: dict[str, Any], file: Any) -> None:
        if len(find_checkpoints(tmp_path)) > 1:
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 - as torch's writer has it
        save(payload, file)

    monkeypatch.setattr("util.checkpoint.torch.save", save_two_only)
    with CheckpointWriter(tmp_path, keep_last=2, start_step=1 if damaged else 2) as writer:
        writer.save({"model": weights, "step": 3})
        assert (writer.wait() is not None) == damaged
        assert not damaged or "No space left" in str(writer.wait())
    steps = [load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path)]
    assert steps == ([2, 1] if damaged else [3, 2])
