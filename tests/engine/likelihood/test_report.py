"""Rows and cells: the right pairs are compared, and the figures are what they are called."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from engine.likelihood.cells import baselines, make_cells, parse_order
from engine.likelihood.measure import Settings, measure
from engine.likelihood.report import mean, paired, rows, show, table, with_one_by_one
from orders.draw import OrderSpec
from orders.files import save_orders, save_schedule
from tests.helpers.likelihood_case import GRID, N, source
from tests.helpers.processes import ALONE
from tests.helpers.tiny_run import L
from util.errors import UserError


def test_intervals_cover_what_they_say() -> None:
    """The true difference is in 95 of 100 intervals, and in far fewer of unpaired ones of the same width."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        difficulty = rng.standard_normal(12)
        a, b = difficulty + 0.1 * rng.standard_normal(12) + 0.05, difficulty + 0.1 * rng.standard_normal(12)
        found = paired(a, b)
        inside += found["low"] <= 0.05 <= found["high"]
        assert found["high"] - found["low"] < 1
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)
    assert mean(a) == pytest.approx({"mean": a.mean(), "stderr": stats.sem(a)})


def test_orders_as_they_are_written(tmp_path: Path) -> None:
    assert vars(parse_order("halton"))["order"] == "halton"
    near = parse_order("lpd:1.5:2")
    assert (near.order, near.proximity_threshold, near.repulsion_threshold) == ("lpd", 1.5, 2)
    far = parse_order("lpd:none:3")
    assert (far.order, far.repulsion_threshold) == ("lpd_far_only", 3)
    assert parse_order("some/orders.json").lpd_order_file == Path("some/orders.json")


@pytest.mark.parametrize(
    ("orders", "steps", "message"),
    [
        (["spiral"], ["4"], "'spiral' must be a file, or one of lpd, raster"),
        (["lpd:1"], ["4"], "lpd:PROXIMITY:REPULSION"),
        (["lpd:near:2"], ["4"], "lpd:PROXIMITY:REPULSION"),
        (["raster:1:2"], ["4"], "thresholds are those of locality-aware orders"),
        (["lpd"], ["17"], "17 must lie between 1 and the 16 tokens"),
        (["lpd"], ["0"], "generation_steps is 0"),
        (["lpd"], ["1,2"], "sum to 3"),
        (["lpd"], ["few"], "'few' must be positive integers"),
        (["lpd"], ["9" * 5000], "must be positive integers"),
        (["lpd", "raster"], ["4", "4"], "lpd/4 is asked for twice"),
        (["none.json"], ["4"], "none.json does not exist"),
    ],
)
def test_orders_and_steps_that_do_not_fit(orders: list[str], steps: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_cells(orders, steps, [], GRID, 0, [True])


def test_what_is_compared_with_what() -> None:
    cells = make_cells(["lpd", "random"], ["8", "4"], [], GRID, 0, [True, False])
    names = [f"{cell.name}{'' if cell.decoding.with_class else '-'}" for cell in cells]
    assert names == ["lpd/8", "lpd/4", "random/8", "random/4", "lpd/8-", "lpd/4-", "random/8-", "random/4-"]
    assert baselines(cells, None) == [0, 1, 0, 1, 4, 5, 4, 5]
    assert baselines(cells, "random") == [2, 3, 2, 3, 6, 7, 6, 7]
    assert baselines(cells, "lpd/4") == [1, 1, 1, 1, 5, 5, 5, 5]
    assert baselines(cells[:2], None) == [0, 0]
    with pytest.raises(UserError, match="'halton' is none of lpd/8, lpd/4, random/8"):
        baselines(cells, "halton")


def test_rows_hold_the_measured_differences(tmp_path: Path) -> None:
    """Each number again from the bits of each image; a schedule file and a file of orders among the cells."""
    held = source(tmp_path / "codes")
    mixed = OrderSpec("lpd", (GRID, GRID), (1, 5, 10), (1.0, None, 0.0), 1, 0)
    save_schedule(tmp_path / "found.json", mixed, {})
    drawn = OrderSpec("random", (GRID, GRID), (1, 5, 10), 1.0, 1, 5)
    save_orders(tmp_path / "o.json", drawn.draw(np.arange(2 * N)))
    orders = ["lpd", "raster", str(tmp_path / "o.json")]
    cells = make_cells(orders, ["1,5,10"], [tmp_path / "found.json"], GRID, 0, [True])
    cells += make_cells(["raster"], ["16"], [], GRID, 0, [True])
    decodings = with_one_by_one(cells, True)
    assert len(decodings) == 8, "raster one by one is a cell of its own"
    measured = measure(held, decodings, Settings(2), tmp_path / "out", ALONE)
    compared_with = baselines(cells, "lpd")
    assert compared_with == [0, 0, 0, 0, None]
    found = rows(cells, compared_with, decodings, measured, pixels=64**2)
    bits = {d.key: measured.image_bits[:, i] / L for i, d in enumerate(decodings)}
    for cell, row in zip(cells, found, strict=True):
        mine, alone = bits[cell.decoding.key], bits[cell.decoding.one_by_one().key]
        assert row["bits_per_token"] == pytest.approx(mean(mine))
        assert row["bits_per_pixel"]["mean"] == pytest.approx(mine.mean() * L / 64**2)
        assert row["parallel_loss"] == pytest.approx(paired(mine, alone))
        assert np.dot(row["step_bits"], row["group_sizes"]) == pytest.approx(mine.mean() * L)
        assert sum(row["position_bits"]) == pytest.approx(mine.mean() * L)
        assert len(row["step_bits"]) == len(row["step_stderr"]) == row["steps"]
    assert found[1]["difference"] == pytest.approx(paired(bits[cells[1].decoding.key], bits[cells[0].decoding.key]))
    assert found[3]["proximity_threshold"] == (1.0, None, 0.0)
    assert found[4]["difference"] is None
    assert set(found[4]["parallel_loss"].values()) == {0.0}
    one = measure(held, decodings[:1], Settings(2), tmp_path / "out", ALONE)
    steps = one.steps[0]
    error = math.sqrt((steps[1][1] / N - (steps[0][1] / N) ** 2) / (N - 1)) / 5
    assert found[0]["step_stderr"][1] == pytest.approx(error)
    text = table(found).splitlines()
    assert [line.count("|") for line in text] == [8] * 7
    assert text[2].startswith("| lpd | 3 | {mean:.3f} ± {stderr:.3f} |".format(**found[0]["bits_per_token"]))
    assert show(found[1]["difference"]) in text[3]


def test_the_class_has_a_column_where_there_are_both(tmp_path: Path) -> None:
    cells = make_cells(["raster"], ["4"], [], GRID, 0, [True, False])
    decodings = with_one_by_one(cells, False)
    measured = measure(source(tmp_path / "codes"), decodings, Settings(), tmp_path / "out", ALONE)
    found = rows(cells, baselines(cells, None), decodings, measured, pixels=64**2)
    assert found[0]["bits_per_token"] != found[1]["bits_per_token"]
    assert [row["parallel_loss"] for row in found] == [None, None]
    lines = table(found).splitlines()
    assert "lost by" not in lines[0]
    assert [line.split(" | ")[2] for line in lines[2:]] == ["with", "without"]
