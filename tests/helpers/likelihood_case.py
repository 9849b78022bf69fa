"""A tiny model in float64 with held-out codes, for tests of likelihoods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine.likelihood.passes import Decoding
from engine.likelihood.source import HeldOut, Source
from models.lpd import LPD, LPDConfig
from orders.config import OrderConfig
from tests.helpers.tiny_models import far_from_initialisation
from tests.helpers.tiny_run import CLASSES, L, V, make_cache
from util.data.codes import MappedCodes

N = 23
GRID = 4


def model(grid: int = GRID, vocab_size: int = V) -> LPD:
    """In float64, with weights under which predictions differ much from code to code."""
    torch.manual_seed(0)
    size = LPDConfig(
        img_size=16 * grid, stride=16, embed_dim=16, depth=2, num_heads=2, class_num=CLASSES, vocab_size=vocab_size
    )
    return far_from_initialisation(LPD(size), 0.4).double().eval().requires_grad_(False)


def source(folder: Path, num_images: int = N) -> Source:
    """Random codes of `num_images` images, in a cache made in this folder where there is none."""
    dataset = MappedCodes(folder if folder.exists() else make_cache(folder, num_images))
    numbers = np.arange(num_images)
    images = HeldOut(dataset, None, numbers, np.asarray(dataset.labels), "test", torch.device("cpu"))
    return Source(model(), images, {})


def decodings(seed: int = 0) -> list[Decoding]:
    """Orders that vary and one that does not, three schedules, with the class and without."""
    found = []
    for order, sizes in (("lpd", (1, 3, 5, 7)), ("random", (4, 12)), ("raster", (1,) * L), ("random", (1, 3, 5, 7))):
        orders = OrderConfig(order=order, group_sizes=sizes).for_grid(GRID, seed)
        found.append(Decoding(orders, orders.group_sizes, with_class=order != "raster"))
    return found
