"""The order in which training draws its samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from util.errors import UserError


class GlobalBatchSampler(Sampler[list[int]]):
    """The samples of one process in each global batch, step after step.

    Epoch ``e`` is a permutation that depends on ``(seed, e)`` alone; step ``s`` of it is rows ``[s·G, (s+1)·G)``, of
    which rank ``r`` gets the ``r``-th contiguous slice of ``G / world_size``. An incomplete last batch is dropped. Any
    number of processes therefore sees the same global batches, and a sampler started at step ``k`` continues exactly
    where an interrupted one stopped, in the middle of an epoch too.

    Args:
        dataset_size: number of samples.
        global_batch: G, samples per step over all processes; a multiple of ``world_size``.
        start_step: first step, counted from the beginning of training (0).
        num_steps: how many steps to yield; None for no end.

    Raises:
        UserError: if the data set is smaller than one global batch, or the batch does not divide among the processes.
    """

    def __init__(
        self,
        dataset_size: int,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        if global_batch < 1 or global_batch % world_size:
            raise UserError(f"global batch {global_batch} must be a positive multiple of the {world_size} process(es).")
        if dataset_size < global_batch:
            raise UserError(
                f"the data set has {dataset_size} samples, fewer than one global batch of {global_batch}; lower the "
                f"samples per process (batch_size × grad_accum) to at most {dataset_size // world_size}."
            )
        self.steps_per_epoch = dataset_size // global_batch
        self._dataset_size = dataset_size
        self._global_batch = global_batch
        self._seed = seed
        self._start_step = start_step
        self._num_steps = num_steps
        per_process = global_batch // world_size
        self._own = slice(rank * per_process, (rank + 1) * per_process)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, step = divmod(self._start_step, self.steps_per_epoch)
        left = math.inf if self._num_steps is None else self._num_steps
        while left > 0:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._dataset_size)
            while step < self.steps_per_epoch and left > 0:
                batch = order[step * self._global_batch : (step + 1) * self._global_batch]
                yield batch[self._own].tolist()
                step += 1
                left -= 1
            epoch, step = epoch + 1, 0
