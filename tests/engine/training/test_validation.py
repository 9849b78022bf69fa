"""The validation loss: what it is, the same for any number of processes, and training is not touched by it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import main_cache
import main_lpd
from engine.training.batch import draw_samples
from engine.training.config import TrainConfig
from engine.training.validation import CHUNK, SEED, Validation, what_limits
from models.lpd import LPD, LPDConfig
from tests.helpers.commands import run
from tests.helpers.processes import ALONE, in_processes
from tests.helpers.tiny_models import tiny_tokenizer, write_images
from tests.helpers.tiny_run import L, V
from tests.helpers.training_case import SCHEDULES, N, build, config, make_cache, stopped_at, train
from tokenizers import save_tokenizer
from util.checkpoint import LAST, load_checkpoint
from util.data.codes import MappedCodes
from util.dist import Dist

assert CHUNK < N < 2 * CHUNK  # a whole and a broken chunk, one for each of two processes


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "codes")


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_the_mean_over_all_tokens_with_nothing_dropped(cache: Path) -> None:
    model, data = build(dropout=0.5), MappedCodes(cache)
    codes, _, labels = data.get_batch(range(N))
    orders, _, _ = draw_samples(SEED, 0, range(N), L, 0.5, 0.1, torch.device("cpu"))
    losses = []
    for start in (0, CHUNK):
        part = slice(start, start + CHUNK)
        sizes = SCHEDULES[np.random.default_rng([SEED, start]).integers(len(SCHEDULES))]
        logits = model.eval()(codes[part], labels[part], orders[part], sizes)
        targets = codes[part].gather(1, orders[part])
        losses += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").tolist()
    validation = Validation(data, SCHEDULES, ALONE)
    model.train()
    assert validation(model) == validation(model) == pytest.approx(np.mean(losses), rel=1e-9)
    assert len(losses) == N * L
    assert model.training


def trained(cache: Path, config: TrainConfig, dist: Dist = ALONE, dropout: float = 0.1) -> None:
    data = MappedCodes(cache)
    validate = Validation(data, SCHEDULES, dist)
    train(build(dropout), data, SCHEDULES, config, dist, validate=validate)


def test_training_is_the_same_with_and_without(cache: Path, tmp_path: Path) -> None:
    train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path / "without", epochs=5), ALONE)
    trained(cache, config(tmp_path / "with", epochs=5, val_freq=2, ema=0.9))
    plain, validated = (load_checkpoint(tmp_path / name / LAST)["model"] for name in ("without", "with"))
    assert all(torch.equal(value, validated[name]) for name, value in plain.items())
    lines = lines_of(tmp_path / "with")
    assert [line["epoch"] for line in lines if "val_loss" in line] == [2, 4, 5]
    assert [line["loss"] for line in lines] == [line["loss"] for line in lines_of(tmp_path / "without")]
    last = load_checkpoint(tmp_path / "with" / LAST)
    for name, weights in (("val_loss", last["model"]), ("val_loss_ema", last["model_ema"])):
        model = build()
        model.load_state_dict(weights)
        assert Validation(MappedCodes(cache), SCHEDULES, ALONE)(model) == lines[-1][name]


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(cache: Path, tmp_path: Path) -> None:
    trained(cache, config(tmp_path / "whole"))
    validate = Validation(MappedCodes(cache), SCHEDULES, ALONE)
    for stop_at in (5, 12):  # at the end of an epoch, and in the middle
        folder = tmp_path / f"stopped{stop_at}"
        train(build(), stopped_at(cache, stop_at), SCHEDULES, config(folder), ALONE, validate=validate)
        checkpoint, model = load_checkpoint(folder / LAST), build()
        model.load_state_dict(checkpoint["model"])
        train(
            model, MappedCodes(cache), SCHEDULES, config(folder), ALONE, resume=checkpoint, validate=validate
        )  # fmt: skip
        measured = [{line["step"]: line.get("val_loss") for line in lines_of(tmp_path / name)} for name in
                    ("whole", folder.name)]  # fmt: skip
        assert [measured[1][step] for step in (5, 10, 15)] == [measured[0][step] for step in (5, 10, 15)]
        assert None not in [measured[0][step] for step in (5, 10, 15)]


def in_two(cache: Path, folder: Path, dist: Dist) -> None:
    trained(cache, config(folder / "ddp", batch_size=4), dist, dropout=0.0)
    trained(cache, config(folder / "fsdp", batch_size=4, fsdp=True, ema=0.9), dist, dropout=0.0)


@pytest.mark.slow
def test_two_processes_measure_the_same(cache: Path, tmp_path: Path) -> None:
    trained(cache, config(tmp_path, ema=0.9), dropout=0.0)
    in_processes(2, partial(in_two, cache, tmp_path))
    alone = [line for line in lines_of(tmp_path) if "val_loss" in line]
    for name in ("ddp", "fsdp"):
        two = [line for line in lines_of(tmp_path / name) if "val_loss" in line]
        assert [line["val_loss"] for line in two] == pytest.approx([line["val_loss"] for line in alone], rel=1e-6)
    assert two[-1]["val_loss_ema"] == pytest.approx(alone[-1]["val_loss_ema"], rel=1e-6)


def test_images_and_their_codes_give_the_same_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes are matched by name: a class without validation images must not shift the labels of the others."""
    tokenizer = tmp_path / "tokenizer.pt"
    save_tokenizer(tiny_tokenizer(16, V), tokenizer)
    write_images(tmp_path / "train", {"a": 4, "b": 4}, 64, 64)
    write_images(tmp_path / "val", {"b": 3}, 64, 64)
    write_images(tmp_path / "other", {"b": 1, "c": 1}, 64, 64)
    for name in ("train", "val"):
        data = ("--data_path", tmp_path / name, "--cached_path", tmp_path / f"{name}_codes")
        assert run(main_cache.main, *data, "--vqgan_path", tokenizer, "--img_size", 64, "--device", "cpu") == 0
    (tmp_path / "schedules.json").write_text("[[1, 15]]")
    base = (
        "--use_cached", "--cached_path", tmp_path / "train_codes", "--vqgan_path", tokenizer, "--model", "lpd_debug",
        "--batch_size", 8, "--epochs", 1, "--device", "cpu", "--num_workers", 0, "--group_sizes_list",
        tmp_path / "schedules.json",
    )  # fmt: skip
    losses = []
    for name, flags in (
        ("codes", ("--val_cached_path", tmp_path / "val_codes")),
        ("images", ("--val_path", tmp_path / "val")),
    ):
        assert run(main_lpd.main, *base, *flags, "--output_dir", tmp_path / name) == 0
        losses.append(lines_of(tmp_path / name)[-1]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    checkpoint = load_checkpoint(tmp_path / "codes" / LAST)
    model = LPD(LPDConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    codes = MappedCodes(tmp_path / "val_codes")
    for label, same in ((0, False), (1, True)):
        codes.labels = np.full(3, label)
        measured = Validation(codes, [[1, 15]], ALONE)(model)
        assert (measured == pytest.approx(losses[0], rel=1e-6)) == same
    capsys.readouterr()
    refused: tuple[tuple[tuple[object, ...], str], ...] = (
        (("--val_path", tmp_path / "other"), "classes that are not trained on (c)"),
        (("--val_path", tmp_path / "val", "--val_cached_path", tmp_path / "val_codes"), "give one of them"),
        (("--val_cached_path", tmp_path / "missing"), "missing file"),
    )
    for words, message in refused:
        assert run(main_lpd.main, *base, *words, "--output_dir", tmp_path / "refused", "--dry_run") == 2
        assert message in capsys.readouterr().err
    assert run(main_lpd.main, *base, "--val_path", tmp_path / "train", "--output_dir", tmp_path / "x", "--dry_run") == 0
    assert "can't show overfitting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([5.0, 4.5, 4.4, 4.405, 4.43, 4.5], "least after epoch 3, 4.400, and is 4.500 now"),
        ([5.0, 4.8, 4.7, 4.6, 4.55, 4.5], "still falling, by 0.100 since epoch 4"),
        ([5.0, 4.5, 4.4, 4.401, 4.4, 4.401], None),
        ([5.0], None),
        ([], None),
    ],
)
def test_a_training_says_whether_it_was_too_short_or_too_long(losses: list[float], sentence: str | None) -> None:
    lines = [{"epoch": 0.5, "loss": 5.0}, *({"epoch": n, "val_loss": loss} for n, loss in enumerate(losses, start=1))]
    said = what_limits(lines)
    assert said is None if sentence is None else said is not None and sentence in said
    averaged = [line | {"val_loss": 1.0, "val_loss_ema": line["val_loss"]} for line in lines if "val_loss" in line]
    assert what_limits(averaged) == said
    odd: dict[str, Any] = {"epoch": 0.1, "val_loss": None}
    assert what_limits([odd, {"epoch": 0.2, "val_loss": float("nan")}, *lines]) == said


def test_an_average_that_lags_behind_does_not_ask_for_more_epochs() -> None:
    losses = zip((5.0, 4.5, 4.4, 4.5, 4.6, 4.7), (6.0, 5.5, 5.2, 5.0, 4.9, 4.8), strict=True)
    lines = [{"epoch": n, "val_loss": a, "val_loss_ema": b} for n, (a, b) in enumerate(losses, start=1)]
    assert what_limits(lines) is None


def test_a_finished_training_says_so_in_its_log(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(cache, config(tmp_path, epochs=6, lr=3e-3))
    assert "the validation loss was" in caplog.text
