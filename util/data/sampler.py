"""The order in which training draws its samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from util.errors import UserError


@dataclass(frozen=True)
class GlobalBatchSampler(Sampler[list[int]]):
    """The samples of one process in each global batch, step after step.

    Epoch ``e`` is a permutation that depends on ``(seed, e)`` alone; step ``s`` of it is rows ``[s·G, (s+1)·G)``, of
    which rank ``r`` gets the ``r``-th contiguous slice of ``G / world_size``. An incomplete last batch is dropped. Any
    number of processes therefore sees the same global batches, and a sampler started at step ``k`` continues exactly
    where an interrupted one stopped, in the middle of an epoch too.

    Raises:
        UserError: if the data set is smaller than one global batch, or the batch does not divide among the processes.
    """

    dataset_size: int
    global_batch: int  # G
    rank: int
    world_size: int
    seed: int
    start_step: int = 0  # counted from the beginning of training
    num_steps: int | None = None  # None for no end

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.global_batch % self.world_size:
            raise UserError(
                f"global batch {self.global_batch} must be a positive multiple of the {self.world_size} process(es)."
            )
        if self.dataset_size < self.global_batch:
            raise UserError(
                f"the data set has {self.dataset_size} samples, fewer than one global batch of {self.global_batch}; "
                "lower the samples per process (batch_size × grad_accum) to at most "
                f"{self.dataset_size // self.world_size}."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.dataset_size // self.global_batch

    def __iter__(self) -> Iterator[list[int]]:
        per_process = self.global_batch // self.world_size
        order = None
        for step in itertools.islice(itertools.count(self.start_step), self.num_steps):
            epoch, row = divmod(step, self.steps_per_epoch)
            if order is None or row == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.dataset_size)
            start = row * self.global_batch + self.rank * per_process
            yield order[start : start + per_process].tolist()
