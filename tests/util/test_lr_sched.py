"""Learning rates against the published schedule."""

from __future__ import annotations

import json

import pytest

from tests.helpers.commands import DATA
from util.lr_sched import learning_rate

CASES = json.loads((DATA / "lr_schedule.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['schedule']}-{case['epoch']}")
def test_learning_rate_equals_reference(case: dict) -> None:
    expected, lr = case["lr"], case["peak_lr"]
    options = {key: value for key, value in case.items() if key not in ("lr", "peak_lr", "epoch")}
    assert learning_rate(case["epoch"], lr=lr, **options) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_never_leaves_the_range_at_the_end() -> None:
    """The last iterations of a run must not climb back up the cosine."""
    options = {"lr": 1.0, "min_lr": 0.1, "warmup_epochs": 1, "epochs": 4, "lr_decay_start_epoch": 2}
    for schedule in ("cosine", "constant+cosine"):
        rates = [learning_rate(1 + i / 10, schedule=schedule, **options) for i in range(40)]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx(0.1)
