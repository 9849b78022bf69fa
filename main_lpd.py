"""Train LPD, or evaluate a checkpoint with --evaluate. Run plainly or under torchrun; see --help."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from engine.config import Config
from engine.evaluation.setup import prepare_evaluation
from engine.options import parse
from engine.recipes import EXPECTED
from engine.training.setup import prepare_training
from engine.training.stop import exit_when_told
from models.lpd import LPDConfig
from util.cli import exit_on_user_error
from util.config import record
from util.dist import Dist, distributed
from util.files import write_json
from util.folder_lock import FolderLock
from util.logger import setup_logging


def announce(config: Config, model: LPDConfig, dist: Dist) -> None:
    """Print the configuration and save it in the run's folder, before any work starts."""
    resolved = {"settings": record(config), "model": vars(model), "world_size": dist.world_size}
    if config.evaluate and config.recipe is not None:
        resolved["published"] = dataclasses.asdict(EXPECTED[config.recipe])
    if dist.is_main:
        print(json.dumps(resolved, indent=2), flush=True)
        if not config.dry_run:
            kind = "eval" if config.evaluate else "train"
            write_json(config.output_dir / f"{kind}_settings.json", resolved)


def main() -> None:
    config = parse()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with exit_when_told(), distributed(config.device) as dist, FolderLock(config.output_dir) as lock:
        setup_logging(dist.rank)
        prepare = prepare_evaluation if config.evaluate else prepare_training
        prepared = prepare(config, dist, lock)
        announce(prepared.config, prepared.model_config, dist)
        status = 0 if config.dry_run else prepared.start()
    sys.exit(status)


if __name__ == "__main__":
    exit_on_user_error(main)
