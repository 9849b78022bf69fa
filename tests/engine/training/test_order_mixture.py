"""Training orders of several kinds: what each sample gets, resumed runs, and flags that cannot be meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import main_lpd
from engine.training.batch import OrderMixture, draw_samples
from orders.config import parse_shares
from orders.schedule import published_group_sizes
from tests.helpers.commands import run
from tests.helpers.orders_oracle import our_luck, slow_order
from tests.helpers.processes import ALONE
from tests.helpers.tiny_run import flags
from tests.helpers.training_case import SCHEDULES, build, config, make_cache, stopped_at, train
from util.checkpoint import LAST, load_checkpoint
from util.config import record
from util.counter_rng import fold_in
from util.data.codes import MappedCodes
from util.errors import UserError

CPU = torch.device("cpu")
HALF = ("random:0.5", "lpd:0.5")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("mixture") / "codes")


def drawn(*shares: str, seed: int = 3, step: int = 5, rows: range = range(40), steps: int = 8) -> torch.Tensor:
    """Orders of an 8×8 grid and a schedule of that many steps."""
    schedules = published_group_sizes(64, 8)
    sizes = next(sizes for sizes in schedules if len(sizes) == steps)
    orders, _, _ = draw_samples(seed, step, rows, 64, 0.5, 0.1, CPU)
    return OrderMixture(parse_shares(shares), 8, schedules, seed).mix(orders, step, rows, sizes)


def test_random_orders_alone_are_those_of_a_run_without_the_flag() -> None:
    """Guards against default trainings that are no longer the same to the bit."""
    plain, _, _ = draw_samples(3, 5, range(40), 64, 0.5, 0.1, CPU)
    assert torch.equal(drawn("random:1"), plain)
    mixed = drawn(*HALF)
    same = (mixed == plain).all(1)
    assert 10 < int(same.sum()) < 30, "the others keep theirs"


@pytest.mark.parametrize("steps", [64, 16, 8, 2])
def test_locality_aware_ones_follow_the_rules_of_decoding(steps: int) -> None:
    """Cell by cell against the slow version, with the group sizes of the step and the default thresholds."""
    sizes = next(sizes for sizes in published_group_sizes(64, 8) if len(sizes) == steps)
    plain = drawn("random:1", rows=range(12), steps=steps)
    found = 0
    for row, order in enumerate(drawn(*HALF, rows=range(12), steps=steps)):
        if torch.equal(order, plain[row]):
            continue
        number = int(fold_in(fold_in(fold_in(torch.tensor(3), 5), row), 1)) & 2**63 - 1
        first, ties = our_luck((8, 8), 3, number)
        assert order.tolist() == slow_order(sizes, (8, 8), 1.0, 1, first, ties)
        found += 1
    assert 2 < found < 10


def test_kinds_have_their_shares_and_follow_from_seed_step_and_row_alone() -> None:
    shares = ("raster:0.2", "random:0.5", "lpd:0.3")
    rows = range(4000)
    mixed, plain = drawn(*shares, rows=rows), drawn("random:1", rows=rows)
    raster = (mixed == torch.arange(64)).all(1)
    assert raster.double().mean().item() == pytest.approx(0.2, abs=0.03)
    same = (mixed == plain).all(1)
    assert same.double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(mixed.sort(1).values, torch.arange(64).expand(4000, 64))
    assert len(mixed[~raster].unique(dim=0)) == int((~raster).sum())
    assert torch.equal(drawn(*shares, rows=range(100, 130)), mixed[100:130])
    for other in (drawn(*shares, seed=4, rows=rows), drawn(*shares, step=6, rows=rows)):
        again = (other == torch.arange(64)).all(1) & raster
        assert again.double().mean().item() == pytest.approx(0.04, abs=0.02), "kinds of another step or seed"


def test_a_resumed_run_is_the_same_run_in_any_parts(cache: Path, tmp_path: Path) -> None:
    """And not the one on random orders."""
    train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path / "whole", train_orders=HALF), ALONE)
    train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path / "random"), ALONE)
    whole, other = (load_checkpoint(tmp_path / name / LAST)["model"] for name in ("whole", "random"))
    assert not torch.equal(whole["head.weight"], other["head.weight"])
    settings = config(tmp_path / "resumed", train_orders=HALF)
    train(build(), stopped_at(cache, 7), SCHEDULES, settings, ALONE)
    resume, model = load_checkpoint(tmp_path / "resumed" / LAST), build()
    assert resume["step"] == 7
    model.load_state_dict(resume["model"])
    train(model, MappedCodes(cache), SCHEDULES, settings, ALONE, resume=resume)
    resumed = load_checkpoint(tmp_path / "resumed" / LAST)["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for name, parts in (("one", {}), ("four", {"batch_size": 2, "grad_accum": 4})):
        settings = config(tmp_path / name, train_orders=HALF, **parts)
        train(build(dropout=0.0), MappedCodes(cache), SCHEDULES, settings, ALONE)
    one, four = (load_checkpoint(tmp_path / name / LAST)["model"] for name in ("one", "four"))
    torch.testing.assert_close(one, four, rtol=1e-8, atol=1e-8)


def test_other_orders_than_until_now_are_said(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(build(), stopped_at(cache, 2), SCHEDULES, config(tmp_path, train_orders=HALF), ALONE)
    args = record(config(tmp_path, train_orders=HALF))
    assert args["train_orders"] == list(HALF), "recorded as plain data"
    for settings, said in ((config(tmp_path, train_orders=HALF), False), (config(tmp_path), True)):
        checkpoint = load_checkpoint(tmp_path / LAST)
        caplog.clear()
        train(build(), stopped_at(cache, 1), SCHEDULES, settings, ALONE, resume=checkpoint | {"args": args})
        assert ("give: --train_orders random:0.5 lpd:0.5" in caplog.text) == said
    del args["train_orders"]  # of a run before there were others
    caplog.clear()
    checkpoint = load_checkpoint(tmp_path / LAST)
    train(build(), MappedCodes(cache), SCHEDULES, config(tmp_path), ALONE, resume=checkpoint | {"args": args})
    assert "other orders" not in caplog.text


@pytest.mark.parametrize(
    ("shares", "named"),
    [
        (("lpd",), "'lpd' must be a kind of order and its share above 0"),
        (("lpd:x",), "'lpd:x' must be"),
        (("lpd:nan",), "'lpd:nan' must be"),
        (("lpd:0", "random:1"), "'lpd:0' must be"),
        (("local:1",), "the kinds are lpd, raster"),
        (("lpd:0.5", "lpd:0.5"), "'lpd' is given twice"),
        (("random:0.5", "lpd:0.4"), "sum to 0.9"),
    ],
)
def test_shares_that_cannot_be_meant(shares: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        config(Path("x"), train_orders=shares)


def test_the_command_takes_shares_and_refuses_schedules_that_do_not_fit(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*flags(cache, tmp_path / "run", epochs=1), "--train_orders", *HALF)
    (tmp_path / "sizes.json").write_text("[[1, 15], [2, 14]]")
    assert run(main_lpd.main, *words, "--group_sizes_list", tmp_path / "sizes.json", "--dry_run") == 2
    assert "order 'lpd' needs 1 as the first group size, got 2" in capsys.readouterr().err
    assert run(main_lpd.main, *words) == 0
    assert load_checkpoint(tmp_path / "run" / LAST)["args"]["train_orders"] == list(HALF)
