"""A tiny evaluation that tests run in this process, in two, or in one that kills itself.

python tests/helpers/evaluation_case.py OUTPUT_DIR EVAL_BSZ [BATCHES_BEFORE_KILL]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.decoding.decoder import Decoded, Decoder
from engine.evaluation import partial_results
from engine.evaluation.config import EvalConfig
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import open_inputs
from engine.scoring.features import FeatureExtractor
from engine.scoring.statistics import FeatureStatistics, save_reference_statistics
from models.lpd import LPD, LPDConfig
from tests.helpers.processes import ALONE
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import VQModel
from util.cli import from_args
from util.dist import Dist, distributed

NUM_IMAGES, CLASSES, SIZE, DIM = 23, 5, 16, 6
GROUP_SIZES = (1, 3, 5, 7)
Batch = tuple[torch.Tensor, ...]


def networks() -> tuple[LPD, VQModel]:
    """In float64, so that the batch an image is in cannot change its codes or bytes by rounding."""
    torch.manual_seed(0)
    size = LPDConfig(img_size=SIZE, stride=4, embed_dim=16, depth=2, num_heads=2, class_num=CLASSES, vocab_size=12)
    return LPD(size).double().eval(), tiny_tokenizer().double()


def toy_extractor() -> FeatureExtractor:
    """A fixed random projection of the pixels."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3 * SIZE * SIZE, DIM + CLASSES, generator=generator, dtype=torch.float64) / 50

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple((images.flatten(1).double() / 255 @ weights).split([DIM, CLASSES], dim=1))

    names = tuple("abcde")
    return FeatureExtractor("toy", DIM, names, "00" * 32, torch.device("cpu"), forward)


def write_reference(path: Path) -> Path:
    statistics = FeatureStatistics(DIM)
    statistics.update(torch.randn(50, DIM, generator=torch.Generator().manual_seed(2)))
    save_reference_statistics(path, statistics, {"extractor": "toy", "extractor_sha256": "00" * 32, "img_size": SIZE})
    return path


def run(
    output_dir: Path,
    eval_bsz: int = 4,
    dist: Dist = ALONE,
    before_batch: Callable[[Batch], None] = lambda batch: None,
    extractor: FeatureExtractor | None = None,
    **fields: Any,
) -> dict[str, Any]:
    reference = output_dir.parent / "reference.npz"
    values: dict[str, Any] = {"cfg": 2.0, "save_images": True, "reference_statistics": reference}
    config, classes = eval_config(output_dir, **values | {"eval_bsz": eval_bsz} | fields)
    model, tokenizer = networks()
    if "feature_extractor" not in fields:
        extractor = extractor or toy_extractor()
    inputs = open_inputs(config, model.config, dist, classes, extractor)
    with hooked(before_batch):
        return evaluate(model, tokenizer, config, inputs, dist)


def eval_config(output_dir: Path, **fields: Any) -> tuple[EvalConfig, tuple[str, ...] | None]:
    """The configuration with these settings, of whichever part, and the class names among them."""
    values: dict[str, Any] = {"output_dir": output_dir, "num_images": NUM_IMAGES, "group_sizes": GROUP_SIZES, "seed": 3}
    values |= fields
    classes = values.pop("classes", None)
    return from_args(EvalConfig, argparse.Namespace(**values)), classes


@contextlib.contextmanager
def hooked(before_batch: Callable[[Batch], None]) -> Iterator[None]:
    """Call `before_batch` with (labels, orders, seeds) of every batch before it is generated."""
    original = Decoder.__call__

    def call(decoder: Decoder, *batch: torch.Tensor) -> Decoded:
        before_batch(batch)
        return original(decoder, *batch)

    with unittest.mock.patch.object(Decoder, "__call__", call):
        yield


def main() -> None:
    output_dir, eval_bsz, *kill_after = sys.argv[1:]
    partial_results.SAVE_INTERVAL_S = 0
    calls = 0

    def die_in_time(batch: Batch) -> None:
        nonlocal calls
        calls += 1
        if kill_after and calls > int(kill_after[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    with distributed("cpu") as dist:
        run(Path(output_dir), int(eval_bsz), dist, die_in_time)


if __name__ == "__main__":
    main()
