"""Training: exact resume in mid-epoch, the same numbers from one and two processes, refusals before work starts."""

from __future__ import annotations

import dataclasses
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import util.data.loading
from engine.training.batch import codes_of, draw_samples
from engine.training.config import TrainConfig
from models.lpd import LPD
from tests.helpers.processes import ALONE, in_processes
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.tiny_run import L
from tests.helpers.training_case import SCHEDULES, build, config, make_cache, stopped_at, train
from util.checkpoint import LAST, load_checkpoint
from util.config import record
from util.data.codes import MappedCodes, open_codes
from util.data.loading import load_batches
from util.data.sampler import GlobalBatchSampler
from util.dist import Dist
from util.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "codes")


@pytest.mark.parametrize("stop_at", [2, 5, 8])
def test_resumed_run_equals_an_uninterrupted_one(cache: Path, tmp_path: Path, stop_at: int) -> None:
    """Bit for bit, also in mid-epoch: weights, optimizer state and the data of every step."""
    whole = build()
    assert train(whole, MappedCodes(cache), SCHEDULES, config(tmp_path / "whole"), ALONE) is None

    folder = tmp_path / "parts"
    assert train(build(), stopped_at(cache, stop_at), SCHEDULES, config(folder), ALONE) == signal.SIGTERM
    checkpoint = load_checkpoint(folder / LAST)
    assert checkpoint["step"] == stop_at
    resumed = build()
    resumed.load_state_dict(checkpoint["model"])
    assert train(resumed, MappedCodes(cache), SCHEDULES, config(folder), ALONE, resume=checkpoint) is None

    first, second = load_checkpoint(tmp_path / "whole" / LAST), load_checkpoint(folder / LAST)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for key, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][key][name]) for name, value in state.items())
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted({*range(3, 16, 3), *range(5, 16, 5), stop_at})


def half_of_each_batch(cache: Path, folder: Path, dist: Dist) -> None:
    train(build(dropout=0.0), MappedCodes(cache), SCHEDULES, config(folder, batch_size=4, bf16=False), dist)


@pytest.mark.slow
def test_two_processes_equal_one(cache: Path, tmp_path: Path) -> None:
    """Same global batches, orders, flips, label drops and learning rates, hence the same weights to rounding."""
    train(build(dropout=0.0), MappedCodes(cache), SCHEDULES, config(tmp_path / "one"), ALONE)
    in_processes(2, partial(half_of_each_batch, cache, tmp_path / "two"))
    first, second = load_checkpoint(tmp_path / "one" / LAST), load_checkpoint(tmp_path / "two" / LAST)
    torch.testing.assert_close(first["model"], second["model"], rtol=1e-9, atol=1e-9)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def draw(
    seed: int, step: int, rows: range, num_tokens: int = L, flip: float = 0.5, drop: float = 0.3
) -> tuple[torch.Tensor, ...]:
    return draw_samples(seed, step, rows, num_tokens, flip, drop, torch.device("cpu"))


def one_is_told_to_stop(cache: Path, folder: Path, dist: Dist) -> None:
    """Both finish the same step."""
    data = stopped_at(cache, batch=3) if dist.rank == 1 else MappedCodes(cache)
    assert train(build(), data, SCHEDULES, config(folder, batch_size=4, log_freq=1000), dist) == signal.SIGTERM


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(cache: Path, tmp_path: Path) -> None:
    in_processes(2, partial(one_is_told_to_stop, cache, tmp_path / "run"))
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == 3  # the step in which it was told


def test_another_learning_rate_than_until_now_is_said(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was started when defaults were others would silently not be the same run."""
    folder = tmp_path / "run"
    train(build(), stopped_at(cache, 2), SCHEDULES, config(folder), ALONE)
    checkpoint, args = load_checkpoint(folder / LAST), record(config(folder))
    earlier = {**args, "lr": None, "blr": 0.5, "warmup_epochs": 0.5}
    train(build(), stopped_at(cache, 3), SCHEDULES, config(folder), ALONE, resume=checkpoint | {"args": earlier})
    assert "to keep it, give: --warmup_epochs 0.5 --blr 0.5" in caplog.text
    caplog.clear()
    checkpoint = load_checkpoint(folder / LAST)
    train(build(), MappedCodes(cache), SCHEDULES, config(folder), ALONE, resume=checkpoint | {"args": args})
    assert "another learning rate" not in caplog.text


def test_resuming_in_other_units_is_refused(cache: Path, tmp_path: Path) -> None:
    """Another batch size or seed would silently repeat and skip samples."""
    train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path, epochs=1), ALONE)
    resume = load_checkpoint(tmp_path / LAST)
    for changes, named in (({"batch_size": 4}, "global_batch 8"), ({"seed": 1}, "seed 0")):
        with pytest.raises(UserError, match=named):
            train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path, **changes), ALONE, resume=resume)


def test_sample_draws_are_permutations_and_do_not_depend_on_the_process() -> None:
    whole = draw(5, 7, range(64))
    orders = whole[0]
    assert torch.equal(orders.sort(dim=1).values, torch.arange(L).expand(64, L))
    assert len(orders.unique(dim=0)) == 64
    for part, expected in zip(draw(5, 7, range(16, 24)), whole, strict=True):
        assert torch.equal(part, expected[16:24])
    assert not torch.equal(orders, draw(5, 8, range(64))[0])
    many = draw(0, 0, range(20000), 2)
    assert many[1].double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert many[2].double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not draw(0, 0, range(2000), 2, flip=0.0)[1].any()
    assert not draw(0, 0, range(2000), 2, drop=0.0)[2].any()
    assert draw(0, 0, range(2000), 2, drop=1.0)[2].all()


def test_orders_are_uniform_over_positions() -> None:
    """Each position comes first equally often: a biased sort key would teach the model a preferred start."""
    orders, _, _ = draw(1, 0, range(16000))
    for column in (0, L - 1):
        counts = orders[:, column].bincount(minlength=L).double()
        assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_images_are_encoded_and_mirrored_like_cached_codes(tmp_path: Path) -> None:
    """Training from images sees the same codes as training from a cache of the same images."""
    vq = tiny_tokenizer(2, 16)
    images = torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8)
    scaled = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        codes, codes_flip = vq.encode(scaled), vq.encode(scaled.flip(-1))
    flip = torch.tensor([True, False, True])
    expected = codes_of([codes, codes_flip], flip, None)
    assert torch.equal(expected[0], codes_flip[0])
    assert torch.equal(expected[1], codes[1])
    assert torch.equal(codes_of([images], flip, vq), expected)


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(build(), MappedCodes(cache), SCHEDULES, config(folder, epochs=2), ALONE)
    good = (folder / LAST).read_bytes()
    checkpoint = load_checkpoint(folder / LAST)
    model = build()
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite in step 11"):
        train(model, MappedCodes(cache), SCHEDULES, config(folder), ALONE, resume=checkpoint)
    assert (folder / LAST).read_bytes() == good
    report = json.loads((folder / "nonfinite-rank0.json").read_text())
    assert (report["step"], report["loss"], len(report["samples"])) == (11, "nan", 8)


def test_frequencies_of_saving_and_evaluating(cache: Path, tmp_path: Path) -> None:
    epochs = []

    def evaluate(model: LPD, epoch: int) -> None:
        """What an interrupted evaluation is resumed from is saved before it starts."""
        assert load_checkpoint(tmp_path / LAST)["epoch"] == epoch
        epochs.append(epoch)

    settings = config(tmp_path, epochs=5, save_intermediate_freq=2, eval_freq=2, save_last_freq=10)
    train(build(), MappedCodes(cache), SCHEDULES, settings, ALONE, evaluate=evaluate)
    assert epochs == [2, 4, 5]
    resume = load_checkpoint(tmp_path / LAST)
    train(build(), MappedCodes(cache), SCHEDULES, settings, ALONE, evaluate=evaluate, resume=resume)
    assert epochs == [2, 4, 5, 5]  # it may have been killed in the middle of the last
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "checkpoint-2.pth",
        "checkpoint-4.pth",
        "checkpoint-last-1.pth",
        "checkpoint-last.pth",
    ]
    assert json.loads((tmp_path / "checkpoint-last.json").read_text())["epoch"] == 5


def test_peak_learning_rate_follows_the_global_batch() -> None:
    settings = TrainConfig(output_dir=Path("x"), batch_size=64, blr=1e-4)
    assert settings.peak_lr(world_size=32) == pytest.approx(8e-4)
    assert dataclasses.replace(settings, lr=3e-4).peak_lr(world_size=32) == 3e-4


def test_default_learning_rate_suits_small_batches() -> None:
    """Guards against a rate at which a small run hardly learns, and against another one at the published batches."""
    for batch_size in (1, 8, 64, 256):
        assert TrainConfig(batch_size=batch_size).peak_lr(world_size=1) == 1e-4
        assert TrainConfig(batch_size=batch_size, blr=1e-4).peak_lr(world_size=1) == 1e-4 * batch_size / 256
    for batch_size in (8, 16, 32, 64):
        given = TrainConfig(batch_size=batch_size, blr=1e-4).peak_lr(world_size=32)
        assert TrainConfig(batch_size=batch_size).peak_lr(world_size=32) == given


@pytest.mark.parametrize("epochs", [1, 2, 5, 50, 200, 450, 1000])
def test_default_schedule_has_the_shape_of_the_published_one(epochs: int) -> None:
    """Guards against a warm-up longer than a short run; of 450 epochs it must be the published one to the bit."""
    settings, published = TrainConfig(epochs=epochs), TrainConfig(epochs=450)
    assert (published.warmup_epochs, published.lr_decay_start_epoch) == (50, 400)
    assert settings.warmup_epochs / epochs == pytest.approx(50 / 450)
    assert settings.lr_decay_start_epoch / epochs == pytest.approx(400 / 450)
    assert record(settings)["warmup_epochs"] == settings.warmup_epochs, "recorded as used"


def test_default_decay_waits_for_the_warm_up_that_is_given() -> None:
    assert TrainConfig(epochs=10, warmup_epochs=9.5).lr_decay_start_epoch == 9.5
    assert TrainConfig(epochs=10, warmup_epochs=0).warmup_epochs == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 0}, "--epochs is 0"),
        ({"batch_size": -2}, "--batch_size is -2"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"grad_clip": 0.0}, "--grad_clip"),
        ({"lr_schedule": "linear"}, "linear"),
        ({"warmup_epochs": 9}, "--warmup_epochs is 9"),
        ({"lr_schedule": "constant+cosine", "lr_decay_start_epoch": 7}, "--lr_decay_start_epoch is 7"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_bad_settings_are_named(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named.replace("+", r"\+")):
        config(Path("x"), **changes)


def test_data_set_smaller_than_a_batch_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="40 samples"):
        train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path, batch_size=64), ALONE)


@pytest.mark.parametrize(("packed", "workers"), [(True, 0), (False, 2)])
def test_only_packed_codes_are_read_in_process(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, workers: int
) -> None:
    """A file per image is too slow for one process: the GPU would wait."""
    (tmp_path / "npz" / "a").mkdir(parents=True)
    codes = np.zeros(L, dtype=np.int64)
    for i in range(8):
        np.savez(tmp_path / "npz" / "a" / f"{i}.npz", indices=codes, indices_flip=codes)
    asked: list[int] = []
    loader = util.data.loading.DataLoader

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options["num_workers"])
        return loader(*arguments, **options)

    monkeypatch.setattr(util.data.loading, "DataLoader", noted)
    dataset = open_codes(cache if packed else tmp_path / "npz")
    sampler = GlobalBatchSampler(8, 4, 0, 1, seed=0, num_steps=1)
    (batch,) = load_batches(dataset, sampler, 2, ALONE.device)
    assert batch[0].shape == (4, L)
    assert asked == [workers]
