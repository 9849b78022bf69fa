"""A tiny training in this process: data, model and configuration, shared by the tests of training."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.training.config import TrainConfig
from engine.training.trainer import Trainer
from models import build_model
from models.lpd import LPD
from tests.helpers import tiny_run
from tests.helpers.tiny_run import CLASSES, V
from util.data.codes import CodeBatch, MappedCodes

N = 40
SCHEDULES = [(1, 3, 5, 7), (1, 15), (1, 1, 2, 4, 8)]
make_cache = functools.partial(tiny_run.make_cache, num_images=N)


def build(dropout: float = 0.1) -> LPD:
    torch.manual_seed(0)
    options = {"img_size": 64, "class_num": CLASSES, "vocab_size": V, "proj_dropout": dropout}
    return build_model("lpd_debug", **options).double()


def config(folder: Path, **changes: object) -> TrainConfig:
    values: dict = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 1, "lr_schedule": "cosine"}
    return TrainConfig(output_dir=folder, **(values | {"num_workers": 0, "log_freq": 3} | changes))


class HookedCodes(MappedCodes):
    """Calls something while batch number `batch`, from 1, is fetched."""

    def __init__(self, path: Path, batch: int, hook: Callable[[], object]) -> None:
        super().__init__(path)
        self.left, self.hook = batch, hook

    def get_batch(self, indices: Sequence[int] | np.ndarray) -> CodeBatch:
        self.left -= 1
        if self.left == 0:
            self.hook()
        return super().get_batch(indices)

    __getitems__ = get_batch


def stopped_at(path: Path, batch: int, number: int = signal.SIGTERM) -> HookedCodes:
    """Codes that send this process a signal while a batch is fetched."""
    return HookedCodes(path, batch, lambda: os.kill(os.getpid(), number))


def train(*arguments: Any, **options: Any) -> int | None:
    """Make a :class:`Trainer` and run it."""
    return Trainer(*arguments, **options).run()
