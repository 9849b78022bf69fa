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
from models.lpd import LPD, LPDConfig
from util.cli import exit_on_user_error
from util.config import record
from util.dist import Dist, distributed
from util.files import write_json
from util.folder_lock import FolderLock
from util.logger import setup_logging


def announce(config: Config, model: LPDConfig, dist: Dist) -> None:
    """Say what will be done and save the whole configuration in the run's folder; of a dry run, print the latter."""
    resolved = {"settings": record(config), "model": vars(model), "world_size": dist.world_size}
    if config.evaluate and config.recipe is not None:
        resolved["published"] = dataclasses.asdict(EXPECTED[config.recipe])
    if not dist.is_main:
        return
    if config.dry_run:
        print(json.dumps(resolved, indent=2), flush=True)
        return
    path = config.output_dir / f"{'eval' if config.evaluate else 'train'}_settings.json"
    write_json(path, resolved)
    print("\n".join([*summary(config, model, dist), f"settings    all of them: {path}"]), flush=True)


def summary(config: Config, model: LPDConfig, dist: Dist) -> list[str]:
    """What a run is, in a few lines."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in LPD(model).parameters())
    side, pixels = model.grid_size, model.img_size
    lines = [
        f"model       {model.depth} layers of width {model.embed_dim}, "
        f"{f'{weights / 1e6:.1f} million' if weights >= 1e6 else f'{weights:,}'} weights, {model.class_num} classes",
        f"pictures    {pixels}×{pixels} pixels, {side}×{side} tokens of {model.vocab_size} codes",
    ]
    training, evaluation, data = config.training, config.evaluation, config.data
    if training is None:
        lines.append(f"weights     {config.pretrained_ckpt}{', their moving average' if config.use_ema else ''}")
        orders, file = evaluation.orders, evaluation.orders.lpd_order_file
        steps = f"{orders.generation_steps} steps" if orders.group_sizes is None else f"groups {orders.group_sizes}"
        lines.append(
            f"evaluation  {evaluation.num_images} images, {steps}, "
            f"order {orders.order if file is None else file}, guidance {evaluation.sampling.cfg:g}"
        )
    else:
        lines.append(f"data        {data.cached_path if data.use_cached else data.data_path}")
        lines.append(
            f"training    {training.epochs} epochs, {training.global_batch(dist.world_size)} samples per step, "
            f"learning rate {training.peak_lr(dist.world_size):.3g}, {training.lr_schedule}"
        )
    precision = "bfloat16" if (training or evaluation).bf16 else "float32"
    lines.append(f"device      {dist.world_size} × {dist.device.type}, {precision}, seed {config.seed}")
    return lines


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
