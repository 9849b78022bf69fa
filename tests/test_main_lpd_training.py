"""Training as a user starts it: fine-tuning on other classes, test runs, pictures, trackers, exit statuses."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine.training.data
import engine.training.setup
import main_lpd
from engine.options import parse
from engine.training.sample_grid import SampleGrid
from models import build_model
from tests.helpers.commands import ROOT, run
from tests.helpers.pictures import assert_not_blank, pixels_of
from tests.helpers.processes import ALONE
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.tiny_run import V
from tests.helpers.training_case import make_cache
from tokenizers import load_tokenizer, save_tokenizer
from util.checkpoint import LAST, load_checkpoint, load_newest
from util.data.codes import MappedCodes
from util.files import sha256


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of three classes, their tokenizer, and checkpoints of five classes: own and in the released layout."""
    folder = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    save_tokenizer(tiny_tokenizer(16, V), folder / "tokenizer.pt")
    header = make_cache(folder / "codes") / "header.json"
    made_by_it = {"tokenizer_sha256": sha256(folder / "tokenizer.pt"), "header_sha256": ""}
    header.write_text(json.dumps(json.loads(header.read_text()) | made_by_it))
    model = build_model("lpd_debug", img_size=64, class_num=5, vocab_size=V)
    torch.save(
        {"model": model.state_dict(), "epoch": 449, "args": argparse.Namespace(lr=1e-4)}, folder / "released.pth"
    )
    torch.save({"model": model.state_dict(), "config": vars(model.config)}, folder / "own.pth")
    return folder


def words(workspace: Path, output: Path, *flags: object) -> list[str]:
    """The command line of a run of two epochs of 5 steps."""
    line = (
        "--use_cached", "--cached_path", workspace / "codes", "--vqgan_path", workspace / "tokenizer.pt",
        "--output_dir", output, "--batch_size", 8, "--lr", 1e-3, "--lr_schedule", "cosine", "--warmup_epochs", 0,
        "--epochs", 2, "--generation_steps", 4, "--device", "cpu", *flags,
    )  # fmt: skip
    return list(map(str, line))


def training(workspace: Path, output: Path, *flags: object) -> int:
    """Exit status of the run."""
    return run(main_lpd.main, *words(workspace, output, *flags))


DEBUG = ("--model", "lpd_debug")


@pytest.mark.parametrize("source", ["released.pth", "own.pth"])
def test_fine_tuning_on_other_classes(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    """The class table is new, all else is the checkpoint's; the recorded configuration has the new classes."""
    flags = ("--pretrained_ckpt", workspace / source, "--lr", 1e-9, *(DEBUG if source == "released.pth" else ()))
    assert training(workspace, tmp_path / "refused", *flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "has 5 classes, this run 3; give --new_classes" in message
    assert "--class_num 5 to keep the old one" in message
    assert training(workspace, tmp_path / "new", *flags, "--new_classes") == 0
    assert training(workspace, tmp_path / "new", *flags, "--new_classes") == 0  # again: it is finished
    assert training(workspace, tmp_path / "kept", *flags, "--class_num", 5) == 0
    old = load_checkpoint(workspace / source)["model"]
    for name, classes in (("new", 3), ("kept", 5)):
        checkpoint = load_checkpoint(tmp_path / name / LAST)
        assert checkpoint["config"]["class_num"] == classes
        assert checkpoint["model"]["class_emb.weight"].shape == (classes, 32)
        for key, value in checkpoint["model"].items():
            if key != "class_emb.weight" or classes == 5:
                torch.testing.assert_close(value, old[key], atol=1e-6, rtol=0, msg=key)
    new = load_checkpoint(tmp_path / "new" / LAST)["model"]["class_emb.weight"]
    assert (new - old["class_emb.weight"][:3]).abs().max() > 1e-3


def test_fine_tuning_that_was_interrupted_keeps_its_new_class_table(workspace: Path, tmp_path: Path) -> None:
    """The same command resumes from its checkpoint: a class table that starts twice would be half trained."""
    flags = ("--pretrained_ckpt", workspace / "own.pth", "--new_classes", "--lr", 1e-2)
    assert training(workspace, tmp_path / "whole", *flags) == 0
    for steps in (4, 7, 0):
        assert training(workspace, tmp_path / "parts", *flags, "--max_steps", steps) == 0
    whole, parts = (load_checkpoint(tmp_path / name / LAST)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_one_step_and_then_the_rest(workspace: Path, tmp_path: Path) -> None:
    """--max_steps 1 tries the whole command: it trains, saves, evaluates nothing and leaves with 0."""
    flags = (*DEBUG, "--online_eval", "--feature_extractor", "none", "--num_images", 3, "--sample_freq", 1)
    assert training(workspace, tmp_path, *flags, "--max_steps", 1) == 0
    assert load_checkpoint(tmp_path / LAST)["step"] == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-last.json", LAST, "metrics.jsonl", "train_settings.json"}
    assert training(workspace, tmp_path, *flags) == 0
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"epoch0001.png", "epoch0002.png"}
    first, last = (pixels_of(tmp_path / "samples" / f"epoch000{epoch}.png") for epoch in (1, 2))
    model = build_model("lpd_debug", img_size=64, class_num=3, vocab_size=V)
    model.load_state_dict(load_checkpoint(tmp_path / LAST)["model"])
    tokenizer = load_tokenizer(workspace / "tokenizer.pt")
    draw = SampleGrid(model.config, tokenizer, parse(words(workspace, tmp_path, *flags)).evaluation, "abc", ALONE)
    expected = draw(model)
    assert expected is not None
    assert np.array_equal(last, pixels_of(expected))
    assert first.shape == last.shape
    assert not np.array_equal(first, last)
    assert_not_blank(tmp_path / "eval_epoch0002" / "grid.png")


def test_of_two_starts_on_a_new_folder_one_trains(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a second run that has found no checkpoints, waits while the first finishes, and overwrites it."""
    statuses = []

    def meanwhile(*arguments: Any) -> Any:
        other = [sys.executable, "main_lpd.py", *words(workspace, tmp_path / "new", *DEBUG)]
        statuses.append(subprocess.run(other, cwd=ROOT, capture_output=True).returncode)
        return open_dataset(*arguments)

    open_dataset = engine.training.setup.open_dataset
    monkeypatch.setattr(engine.training.setup, "open_dataset", meanwhile)
    assert training(workspace, tmp_path / "new", *DEBUG) == 0
    assert statuses == [2]


FAKE_WANDB = """
import json, os
LOG = os.environ["FAKE_WANDB_LOG"]
def note(**values):
    with open(LOG, "a") as file:
        file.write(json.dumps(values) + "\\n")
class Image:
    def __init__(self, picture):
        self.size = picture.size
class Run:
    def log(self, values, step):
        note(step=step, names=sorted(values))
    def finish(self):
        note(finished=True)
def init(project, name, id, resume, config, dir):
    if project == "refused":
        raise RuntimeError("api_key not configured\\n(more)")
    note(project=project, name=name, id=id, resume=resume, lr=config["lr"])
    return Run()
"""


@pytest.fixture
def wandb_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "wandb.jsonl"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield tmp_path / "wandb.jsonl"
    sys.modules.pop("wandb", None)


def test_a_resumed_run_is_the_same_wandb_run(workspace: Path, tmp_path: Path, wandb_log: Path) -> None:
    flags = (
        *DEBUG, "--use_wandb", "--wandb_project", "p", "--wandb_run_name", "n", "--sample_freq", 1, "--online_eval",
        "--feature_extractor", "none", "--num_images", 3,
    )  # fmt: skip
    assert training(workspace, tmp_path / "run", *flags, "--max_steps", 7) == 0
    assert training(workspace, tmp_path / "run", *flags) == 0
    lines = [json.loads(line) for line in wandb_log.read_text().splitlines()]
    starts = [line for line in lines if "project" in line]
    assert [(line["project"], line["name"], line["resume"]) for line in starts] == [("p", "n", "allow")] * 2
    assert starts[0]["id"] == starts[1]["id"]
    assert sum("finished" in line for line in lines) == 2
    figures = [line for line in lines if "loss" in line.get("names", ())]
    assert [line["step"] for line in figures] == [5, 7, 10]
    assert [line["step"] for line in lines if line.get("names") == ["samples"]] == [5, 10]
    assert [line["step"] for line in lines if "eval/images_per_sec" in line.get("names", ())] == [10]
    assert training(workspace, tmp_path / "other", *flags, "--max_steps", 1) == 0
    assert json.loads(wandb_log.read_text().splitlines()[-3])["id"] != starts[0]["id"]


def test_wandb_without_a_login_is_one_sentence(
    workspace: Path, tmp_path: Path, wandb_log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training(workspace, tmp_path / "run", *DEBUG, "--use_wandb", "--wandb_project", "refused") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "(api_key not configured); run wandb login" in message
    assert not wandb_log.exists()


def test_tensorboard_has_figures_and_pictures(workspace: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = (*DEBUG, "--tensorboard", "--sample_freq", 2)
    assert training(workspace, tmp_path, *flags, "--max_steps", 7) == 0
    assert training(workspace, tmp_path, *flags) == 0
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [5, 7, 10]
    assert {"lr", "grad_norm", "images_per_sec", "data_wait_share"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Images("samples")] == [10]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--max_steps", -1), "--max_steps is -1"),
        (("--keep_last", 0), "--keep_last is 0"),
        (("--save_last_steps", -1), "--save_last_steps is -1"),
        (("--sample_freq", -1), "--sample_freq is -1"),
        (("--sample_freq", 1, "--generation_steps", 20), "number of steps 20"),
        (("--sample_freq", 1, "--cfg", 0.5), "cfg is 0.5"),
        (("--new_classes",), "--new_classes needs --pretrained_ckpt"),
    ],
)
def test_wrong_flags(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], named: str
) -> None:
    assert training(workspace, tmp_path / "wrong", *DEBUG, *flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert named in message
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("flag", "package"), [("tensorboard", "tensorboard"), ("use_wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_named(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    package: str,
) -> None:
    monkeypatch.setattr("engine.training.trackers.importlib.util.find_spec", lambda name: None)
    assert training(workspace, tmp_path / "wrong", *DEBUG, f"--{flag}") == 2
    assert f"pip install {package}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_exit_status_after_a_signal(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """What a launcher decides by: 75 is put back into the queue, and everything is saved by then."""
    fetch: Callable[..., Any] = MappedCodes.get_batch
    left = 3

    def fetch_and_signal(self: MappedCodes, indices: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return fetch(self, indices)

    monkeypatch.setattr(MappedCodes, "__getitems__", fetch_and_signal)
    assert training(workspace, tmp_path, *DEBUG) == status
    assert load_checkpoint(tmp_path / LAST)["step"] == 3


def test_results_of_an_earlier_run_are_not_kept(workspace: Path, tmp_path: Path) -> None:
    """A training started over in the same folder would pass the old model's scores off as its own."""
    flags = (*DEBUG, "--online_eval", "--feature_extractor", "none", "--num_images", 3)
    results = tmp_path / "eval_epoch0002" / "results.json"
    results.parent.mkdir()
    results.write_text("{}")
    assert training(workspace, tmp_path, *flags) == 0
    record = json.loads(results.read_text())["record"]
    assert record == {"training_recipe": None, "epoch": 2, "step": 10, "ema": 0.0}
    before = results.stat().st_mtime_ns
    assert training(workspace, tmp_path, *flags) == 0  # resumed just there: done already
    assert results.stat().st_mtime_ns == before
    results.unlink()
    assert training(workspace, tmp_path, *flags) == 0  # killed in the middle of it
    assert results.exists()


def test_the_weights_resumed_from_do_not_stay_in_memory(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model they are gigabytes per process."""
    seen: list[bool] = []
    left: list[Any] = []

    def load(*arguments: Any) -> Any:
        found = load_newest(*arguments)
        if found is not None:
            left.append(weakref.ref(next(iter(found[1]["model"].values()))))
        return found

    fetch: Callable[..., Any] = MappedCodes.get_batch

    def look(self: MappedCodes, indices: Any) -> Any:
        seen.extend(reference() is not None for reference in left)
        return fetch(self, indices)

    assert training(workspace, tmp_path, *DEBUG, "--max_steps", 9) == 0
    monkeypatch.setattr(engine.training.setup, "load_newest", load)
    monkeypatch.setattr(MappedCodes, "__getitems__", look)
    assert training(workspace, tmp_path, *DEBUG) == 0
    assert seen == [False]


def test_a_published_recipe_refuses_codes_of_another_tokenizer(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names no --vqgan_path, with which they would be compared."""
    flags = (
        "--recipe", "lpd_l_256", "--cached_path", workspace / "codes", "--output_dir", tmp_path / "run",
        "--img_size", 64, "--device", "cpu", *DEBUG, "--dry_run", "--batch_size", 8, "--no-bf16",
    )  # fmt: skip
    assert run(main_lpd.main, *flags) == 2
    assert "made with another tokenizer (stride 16, 11 codes)" in capsys.readouterr().err
    assert run(main_lpd.main, *flags, "--vqgan_path", workspace / "tokenizer.pt") == 0
    other = tmp_path / "other.pt"
    other.write_bytes(b"the published one")
    monkeypatch.setattr(engine.training.data, "TOKENIZER", str(other))
    assert run(main_lpd.main, *flags) == 2
    assert "made with another tokenizer (SHA-256" in capsys.readouterr().err
