"""The pictures drawn while a model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.evaluation.evaluate import image_seeds
from engine.generate import generate
from engine.training.sample_grid import SampleGrid
from models import build_model
from models.lpd import LPD
from orders import generate_orders
from tests.helpers.evaluation_case import eval_config
from tests.helpers.pictures import assert_shows
from tests.helpers.processes import ALONE
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.tiny_run import V
from util.dist import Dist
from util.pictures import to_uint8

SIZES = (1, 3, 5, 7)


class RankOfTwo(Dist):
    """One of two processes, whose parts meet in a list."""

    parts: list[Any] = []  # noqa: RUF012 - shared on purpose

    def gather(self, value: Any) -> list[Any]:
        self.parts.append(value)
        return self.parts


def model() -> LPD:
    return build_model("lpd_debug", img_size=64, class_num=3, vocab_size=V)


def test_same_images_from_two_processes_and_every_time(tmp_path: Path) -> None:
    """Pictures of different epochs are compared, so nothing but the weights may change them."""
    torch.manual_seed(3)
    first, tokenizer = model(), tiny_tokenizer(16, V)
    config, names = eval_config(tmp_path, group_sizes=SIZES, cfg=2.0, seed=5, classes=("a", "b", "c"))
    draw = SampleGrid(first.config, tokenizer, config, names, ALONE)
    picture = draw(first)
    assert picture is not None
    assert first.training

    orders = torch.from_numpy(generate_orders("lpd", 12, SIZES, 4, seed=5)).long()
    labels = torch.arange(3).repeat_interleave(4)
    with torch.no_grad():
        codes = generate(first.eval(), labels, orders, SIZES, cfg=2.0, seeds=image_seeds(5, torch.arange(12)))
        images = to_uint8(tokenizer.decode(codes))
    assert_shows(picture, images, columns=4).assert_labelled()

    first.train()
    torch.rand(7)
    assert picture == draw(first)
    assert SampleGrid(first.config, tokenizer, config, names, RankOfTwo(1, 2, ALONE.device))(first) is None
    assert picture == SampleGrid(first.config, tokenizer, config, names, RankOfTwo(0, 2, ALONE.device))(first)
    assert picture != draw(model())
