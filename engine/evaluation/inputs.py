"""What an evaluation works with besides model and tokenizer: orders, reference statistics, feature extractor."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.decoding.decoder import resolve_path
from engine.evaluation.config import EvalConfig
from engine.evaluation.outputs import check_replaceable
from engine.scoring.features import FeatureExtractor, inception_cache, load_feature_extractor
from engine.scoring.statistics import ReferenceStatistics, load_reference_statistics
from models.lpd import LPDConfig
from orders.draw import Orders
from util.dist import Dist
from util.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalInputs:
    """All of it, opened and checked."""

    orders: Orders
    reference: ReferenceStatistics | None
    extractor: FeatureExtractor | None
    classes: tuple[str, ...] | None  # names in label order


def open_inputs(
    config: EvalConfig,
    model: LPDConfig,
    dist: Dist,
    classes: Sequence[str] | None = None,
    extractor: FeatureExtractor | None = None,
    *,
    download: bool = True,
) -> EvalInputs:
    """Open the files of an evaluation, and check all that can be checked without the model's weights.

    Args:
        classes: names of the classes in label order, as a checkpoint or a data set has them.
        extractor: ``config.scoring.feature_extractor``, where it is loaded already.
        download: False leaves out an extractor whose weights would have to be downloaded, and says so.

    Raises:
        UserError: for settings or files that don't fit each other or the model.
    """
    scoring = config.scoring
    reference = (
        None if scoring.reference_statistics is None else load_reference_statistics(scoring.reference_statistics)
    )
    config.sampling.check_top_k(model.vocab_size)
    resolve_path(config.decode_path, dist.device, torch.float32, config.bf16)
    orders = config.orders.for_grid(model.grid_size, config.seed, config.num_images)
    if classes is not None and len(classes) != model.class_num:
        raise UserError(f"{len(classes)} class names are given for a model of {model.class_num} classes.")
    if config.save_images:
        check_replaceable(config.output_dir / "images")
    if extractor is None and scoring.feature_extractor is not None:
        if download or not scoring.needs_download:
            extractor = _load_extractor(scoring.feature_extractor, scoring.inception_path, dist)
        else:
            logger.info("the Inception weights will be downloaded to %s", inception_cache())
    if reference is not None and extractor is not None:
        reference.check(extractor, model.img_size)
        if scoring.adm_suite:
            reference.check_adm_suite(model.img_size)
    return EvalInputs(orders, reference, extractor, None if classes is None else tuple(classes))


def _load_extractor(name: str, inception_path: Path | None, dist: Dist) -> FeatureExtractor:
    loaded: list[FeatureExtractor] = []

    def load() -> None:
        loaded.append(load_feature_extractor(name, dist.device, inception_path))

    dist.on_main(load)  # downloads what is missing
    if not loaded:
        load()
    return loaded[0]
