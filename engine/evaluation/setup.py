"""From the configuration of an evaluation to one that is ready to start: all inputs opened and checked."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.class_names import class_names
from engine.config import Config
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import EvalInputs, open_inputs
from engine.hub.remote import choose_tokenizer, choose_weights
from engine.model_choice import check_tokenizer, load_pretrained
from engine.named_files import check_files, local_file, tokenizer_named
from engine.options import recipe_changes
from engine.recipes import EXPECTED
from models.lpd import LPD, LPDConfig, load_weights
from tokenizers import VQModel, load_tokenizer, log_quality
from util.dist import Dist
from util.errors import about
from util.files import check_output_dir, sha256
from util.folder_lock import FolderLock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation that only has to be started."""

    config: Config
    dist: Dist
    model: LPD
    tokenizer: VQModel
    inputs: EvalInputs
    files: dict[str, Path]  # of the weights and the tokenizer, by the name of their flag

    @property
    def model_config(self) -> LPDConfig:
        return self.model.config

    def start(self) -> int:
        """Evaluate and print the figures; returns the exit status."""
        model = self.model.to(self.dist.device).eval()
        record = self._record()
        results = evaluate(model, self.tokenizer, self.config.evaluation, self.inputs, self.dist, record=record)
        if self.dist.is_main:
            figures = {name: value for name, value in results.items() if isinstance(value, int | float)}
            print(json.dumps(figures, indent=2))
        return 0

    def _record(self) -> dict[str, Any]:
        """What the results say of how they came about."""
        recipe = self.config.recipe
        record: dict[str, Any] = {"recipe": recipe, "expected": None, "ema": self.config.use_ema}
        if recipe is not None:
            record |= {"expected": dataclasses.asdict(EXPECTED[recipe]), "changed": recipe_changes(self.config)}
        if self.dist.is_main:
            record |= {name: {"path": str(path), "sha256": sha256(path)} for name, path in self.files.items()}
        return record


def prepare_evaluation(config: Config, dist: Dist, lock: FolderLock) -> PreparedEvaluation:
    """Open and check all that an evaluation needs; called by all processes.

    Args:
        lock: of the output folder, taken here; not for a dry run.

    Raises:
        UserError: for a file that is missing or damaged, or settings and files that do not fit each other.
    """
    check_output_dir(config.output_dir)
    check_files(config)
    tokenizer_path = tokenizer_named(config)
    assert config.pretrained_ckpt is not None
    assert tokenizer_path is not None
    if not config.dry_run:
        dist.on_main(lock.acquire)
    download = not config.dry_run
    tokenizer_file = local_file(tokenizer_path, choose_tokenizer, dist, download)
    weights_file = local_file(config.pretrained_ckpt, choose_weights, dist, download)
    checkpoint = load_pretrained(weights_file, config.use_ema)
    tokenizer = load_tokenizer(tokenizer_file, dist.device)
    log_quality(tokenizer_file)
    check_tokenizer(checkpoint, weights_file, sha256(tokenizer_file))
    with about(weights_file):
        model_config = config.model.resolve(checkpoint.get("config"), tokenizer.stride, tokenizer.config.codebook_size)
    classes = class_names(model_config, checkpoint.get("classes"))
    inputs = open_inputs(config.evaluation, model_config, dist, classes, download=download)
    if inputs.orders.rows is not None:
        logger.info("image i uses order i of %s", config.evaluation.orders.lpd_order_file)
    model = LPD(model_config)
    load_weights(model, checkpoint["model"], str(weights_file))
    files = {"pretrained_ckpt": weights_file, "vqgan_path": tokenizer_file}
    return PreparedEvaluation(config, dist, model, tokenizer, inputs, files)
