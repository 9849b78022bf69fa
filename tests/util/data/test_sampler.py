"""The order of samples: the same for any number of processes, and after a restart."""

from __future__ import annotations

import itertools

import pytest

from util.data.sampler import GlobalBatchSampler
from util.errors import UserError


def _steps(world_size: int, start: int, count: int, size: int = 23, batch: int = 8) -> list[list[int]]:
    """The global batches that ``world_size`` processes see together, as each process's shares in rank order."""
    shares = [
        list(GlobalBatchSampler(size, batch, rank, world_size, seed=3, start_step=start, num_steps=count))
        for rank in range(world_size)
    ]
    return [list(itertools.chain(*step)) for step in zip(*shares, strict=True)]


class TestGlobalBatchSampler:
    def test_every_world_size_sees_the_same_batches(self) -> None:
        """Guards against a run whose data change with the number of GPUs."""
        assert _steps(1, 0, 7) == _steps(2, 0, 7) == _steps(4, 0, 7) == _steps(8, 0, 7)

    @pytest.mark.parametrize("start", [1, 2, 3, 5])
    def test_a_run_resumes_where_it_stopped(self, start: int) -> None:
        """Guards against repeated or lost samples after a restart in mid-epoch or at its border."""
        assert _steps(2, start, 7 - start) == _steps(2, 0, 7)[start:]

    def test_epochs_are_different_permutations(self) -> None:
        """Guards against repeated samples within an epoch, the same order every epoch, and a kept incomplete batch."""
        first, second = (list(itertools.chain(*_steps(1, start, 2))) for start in (0, 2))
        assert len(set(first)) == len(first) == 16
        assert len(set(second)) == len(second) == 16
        assert first != second
        assert set(first) | set(second) <= set(range(23))

    def test_yields_for_ever_by_default(self) -> None:
        """Guards against training that stops at the end of an epoch."""
        sampler = GlobalBatchSampler(5, 5, 0, 1, seed=0)
        assert sampler.steps_per_epoch == 1
        assert len(list(itertools.islice(sampler, 100))) == 100

    def test_impossible_batches_are_refused(self) -> None:
        """Guards against an epoch of no steps, or processes with unequal shares."""
        with pytest.raises(UserError, match=r"7 samples.*to at most 3"):
            GlobalBatchSampler(7, 8, 0, 2, seed=0)
        with pytest.raises(UserError, match="multiple of the 2 process"):
            GlobalBatchSampler(100, 9, 0, 2, seed=0)
        with pytest.raises(UserError, match="global batch 0"):
            GlobalBatchSampler(100, 0, 0, 1, seed=0)
