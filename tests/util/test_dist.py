"""Several processes: what rank 0 alone does."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.processes import in_processes
from util.dist import Dist
from util.errors import UserError


def take_long(folder: Path, dist: Dist) -> None:
    def wait() -> list[int]:
        threading.Event().wait(2.5)
        return [dist.rank]

    def fail() -> None:
        raise UserError("no such file")

    assert dist.on_main(wait) == [0]
    with pytest.raises(UserError, match="no such file"):
        dist.on_main(fail)
    assert dist.on_main(lambda: dist.rank) == 0
    (folder / str(dist.rank)).touch()


@pytest.mark.slow
def test_rank_0_may_take_longer_than_a_collective_and_its_error_reaches_all(tmp_path: Path) -> None:
    """The others would be ended by the time limit, or wait in a barrier for a process that has left."""
    in_processes(2, partial(take_long, tmp_path), timeout=timedelta(seconds=1))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_one_process_just_runs_it() -> None:
    assert Dist(0, 1, None).on_main(lambda: 3) == 3  # type: ignore[arg-type]
