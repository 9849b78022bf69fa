"""A damaged checkpoint costs the steps since the one before it, whatever the damage is, and is never resumed from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main_lpd
from engine.training.resume import load_resumable
from tests.helpers.commands import run
from tests.helpers.tiny_run import flags, make_cache, steps_done
from util.checkpoint import LAST, load_checkpoint, load_newest, save_checkpoint
from util.errors import UserError

Content = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that kept the states after 4 and 8, and its code cache."""
    folder = tmp_path_factory.mktemp("resume")
    cache = make_cache(folder / "codes", num_images=16)
    words = flags(cache, folder / "run", epochs=2)
    assert run(main_lpd.main, *words, "--save_last_steps", 4, "--ema", 0.9) == 0
    return folder


def changed(**changes: Any) -> Callable[[Content], Content]:
    return lambda content: content | changes


def first_moment(value: Any) -> Callable[[Content], Content]:
    def change(content: Content) -> Content:
        content["optimizer"]["state"][0]["exp_avg"] = value
        return content

    return change


def without(*names: str) -> Callable[[Content], Content]:
    return lambda content: {key: value for key, value in content.items() if key not in names}


ODD = {
    "step as text": changed(step="8"),
    "step true": changed(step=True),
    "step below zero": changed(step=-8),
    "optimizer empty": changed(optimizer={}),
    "optimizer a list": changed(optimizer=[1]),
    "optimizer without moments": lambda content: content | {"optimizer": content["optimizer"] | {"state": {}}},
    "one group": lambda content: content | {"optimizer": content["optimizer"] | {"param_groups": [{"params": [0]}]}},
    "a moment of another shape": first_moment(torch.zeros(3)),
    "a moment as text": first_moment("zeros"),
    "config empty": changed(config={}),
    "config none": changed(config=None),
    "config of texts": lambda content: content | {"config": dict.fromkeys(content["config"], "4")},
    "dropout as text": lambda content: content | {"config": content["config"] | {"proj_dropout": "0.1"}},
    "global batch a list": changed(global_batch=[4]),
    "no number of samples": without("num_samples"),
    "seed as text": changed(seed="0"),
    "tokenizer hash a number": changed(tokenizer_sha256=5),
    "average empty": changed(model_ema={}),
    "average a number": changed(model_ema=1.0),
    "average of another model": changed(model_ema={"a": torch.zeros(1)}),
    "weights of another model": changed(model={"a": torch.zeros(1)}),
    "weights not finite": lambda content: content | {"model": {k: v * torch.nan for k, v in content["model"].items()}},
    "weights only": without("optimizer", "step"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_content_is_skipped(folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    for file in (LAST, "checkpoint-last-1.pth"):
        (tmp_path / file).write_bytes((folder / "run" / file).read_bytes())
    assert load_resumable(tmp_path / LAST)["step"] == 8
    save_checkpoint(tmp_path / LAST, ODD[name](load_resumable(tmp_path / LAST)))
    newest = load_newest(tmp_path, load_resumable)
    assert newest is not None
    assert (newest[0].name, newest[1]["step"]) == ("checkpoint-last-1.pth", 4)
    (warning,) = caplog.messages
    assert warning.startswith("skipped: ")
    assert f"{tmp_path / LAST} " in warning
    assert "\n" not in warning


def test_what_a_gpu_has_saved_is_resumed_from(folder: Path, tmp_path: Path) -> None:
    """AdamW's fused kernels keep the step counts with the moments, and load_state_dict moves them there."""
    content = load_checkpoint(folder / "run" / LAST)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = True
    save_checkpoint(tmp_path / LAST, content)
    assert load_resumable(tmp_path / LAST)["step"] == 8


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One of: text or zeros in its place, cut, some bytes changed (the plain data is at the start), blocks swapped."""
    kind = rng.integers(6)
    if kind == 0:
        return b"step: 8\n" * int(rng.integers(0, 100))
    if kind == 1:
        return bytes(int(rng.integers(1, len(content))))
    if kind == 2:
        return content[: rng.integers(len(content))]
    if kind == 3:
        half = int(rng.integers(1, len(content)))
        return content[half:] + content[:half]
    changed, places = bytearray(content), rng.integers(len(content) if kind == 4 else 4000, size=rng.integers(1, 9))
    for place in places:
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


def test_damaged_bytes_are_one_sentence_or_harmless(folder: Path, tmp_path: Path) -> None:
    whole, rng = (folder / "run" / LAST).read_bytes(), np.random.default_rng(0)
    expected, path, refused, harmless = load_resumable(folder / "run" / LAST), tmp_path / LAST, 0, 0
    for case in range(60):
        path.write_bytes(damaged(whole, rng))
        try:
            found = load_resumable(path)
        except UserError as error:
            refused += str(error).count("\n") == 0
        else:  # a byte that nothing reads
            assert found["step"] == 8, case
            assert all(torch.equal(value, found["model"][key]) for key, value in expected["model"].items()), case
            harmless += 1
    assert refused + harmless == 60
    assert refused > 50


def test_a_run_goes_on_from_the_checkpoint_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: the odd checkpoint is named, the run ends where it would have."""
    last = folder / "run" / LAST
    save_checkpoint(last, load_resumable(last) | {"optimizer": {}})
    assert run(main_lpd.main, *flags(folder / "codes", folder / "run", epochs=2), "--ema", 0.9) == 0
    errors = capsys.readouterr().err
    assert f"skipped: checkpoint {last}" in errors
    assert "checkpoint-last-1.pth, step 4" in errors
    assert steps_done(folder / "run") == 8
