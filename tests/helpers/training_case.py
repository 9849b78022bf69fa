"""A tiny training in this process: data, model and configuration, shared by the tests of training."""

from __future__ import annotations

import functools
import socket
from pathlib import Path

import torch

from engine.training.trainer import TrainConfig
from models import build_model
from models.lpd import LPD
from tests.helpers import tiny_run
from tests.helpers.tiny_run import CLASSES, V
from util.dist import Dist

N = 40
SCHEDULES = [(1, 3, 5, 7), (1, 15), (1, 1, 2, 4, 8)]
CPU = Dist(0, 1, torch.device("cpu"))
make_cache = functools.partial(tiny_run.make_cache, num_images=N)


def build(dropout: float = 0.1) -> LPD:
    torch.manual_seed(0)
    options = {"img_size": 64, "class_num": CLASSES, "vocab_size": V, "proj_dropout": dropout}
    return build_model("lpd_debug", **options).double()


def config(folder: Path, **changes: object) -> TrainConfig:
    values: dict = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 1, "lr_schedule": "cosine"}
    return TrainConfig(output_dir=folder, **(values | {"num_workers": 0, "log_freq": 3} | changes))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
