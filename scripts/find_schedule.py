"""Finds group sizes and thresholds under which a trained model finds held-out images likeliest.

    python -m scripts.find_schedule --pretrained_ckpt runs/demo/lpd/checkpoint-last.pth \\
        --vqgan_path runs/demo/tokenizer/tokenizer.pt --data_path runs/demo/digits/test \\
        --generation_steps 8 --budget_sec 120 --output_dir runs/demo/schedule
    python main_lpd.py --evaluate --schedule_file runs/demo/schedule/schedule.json …

Half of the images are searched on, the other half, which the search never sees, says how much better the schedule is
than the published one with as many steps. Writes schedule.json, and prints the result as JSON in the last line.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.evaluation.outputs import describe_environment
from engine.likelihood.measure import Meter, Settings
from engine.likelihood.report import mean, paired, show
from engine.likelihood.search import Samples, Search
from engine.likelihood.source import Source, SourceConfig, open_source
from engine.run_config import RunConfig
from orders.config import OrderConfig
from orders.draw import ORDER_KINDS, OrderSpec
from orders.files import save_schedule
from orders.schedule import default_steps
from util.cli import Parser, exit_on_user_error, from_args
from util.config import MAX_COUNT, record, setting
from util.dist import Dist, distributed
from util.errors import UserError
from util.files import check_output_dir
from util.folder_lock import FolderLock
from util.logger import setup_logging

MAX_SEARCH_SEC = 7 * 86400


@dataclass(frozen=True, kw_only=True)
class SearchConfig(SourceConfig, RunConfig):
    """What is searched for, on which images, and for how long."""

    generation_steps: int | None = setting(
        None, "decoding steps of the schedule (default: 20 for 16×16 tokens, as published)"
    )
    order: str = setting("lpd", "its kind of order; thresholds are those of lpd", choices=ORDER_KINDS)
    budget_sec: float = setting(
        120.0, "seconds of search; the confirmation comes after", above=0, at_most=MAX_SEARCH_SEC
    )
    orders_per_image: int = setting(4, "orders of each image in the confirmation", at_least=1, at_most=MAX_COUNT)


def find(config: SearchConfig, source: Source, dist: Dist) -> tuple[OrderSpec, dict[str, Any]]:
    """Search, confirm on the other images, and write ``schedule.json``; returns the schedule and its ``found``."""
    model, images = source.model.config, np.arange(len(source.images))
    if len(images) < 4:
        raise UserError(f"{len(images)} images are too few: the search and its confirmation need two each.")
    steps = default_steps(model.grid_size) if config.generation_steps is None else config.generation_steps
    published = OrderConfig(order=config.order, generation_steps=steps)
    start = published.for_grid(model.grid_size, config.seed).spec
    meter = Meter(source, Settings(bf16=config.bf16, batch_size=config.batch_size))
    begun = time.monotonic()
    with tqdm(total=config.budget_sec, desc="searching", unit="s", disable=not dist.is_main) as progress:
        samples = Samples(meter, images[::2], dist, begun + config.budget_sec, progress)
        search = Search(samples, start, config.seed)
        best = search.run()
    seconds, searched = time.monotonic() - begun, samples.passes
    samples = Samples(meter, images[1::2], dist, float("inf"))
    found = {
        "seconds": round(seconds, 1),
        "passes": searched,
        "rounds_won": search.history,
        **confirm(samples, best, start, config.orders_per_image),
        "settings": record(config),
        "source": source.record,
        "environment": describe_environment(dist) | {"threads": torch.get_num_threads()},
    }
    dist.on_main(lambda: save_schedule(config.output_dir / "schedule.json", best, found))
    return best, found


def confirm(samples: Samples, best: OrderSpec, published: OrderSpec, orders_per_image: int) -> dict[str, Any]:
    """Both schedules on images of which the search knows nothing, each in several orders; means over images."""
    count = len(samples.images)

    def per_image(spec: OrderSpec) -> np.ndarray:
        return samples.bits(spec, count * orders_per_image).reshape(orders_per_image, count).mean(0)

    mine, theirs = per_image(best), per_image(published)
    return {
        "confirmed_on": count,
        "bits_per_token": mean(mine),
        "published_group_sizes": list(published.group_sizes),
        "published_bits_per_token": mean(theirs),
        "difference": paired(mine, theirs),
    }


def summary(config: SearchConfig, best: OrderSpec, found: dict[str, Any]) -> dict[str, Any]:
    """What the last line says."""
    kept = ("seconds", "passes", "confirmed_on", "bits_per_token", "published_bits_per_token", "difference")
    path = config.output_dir / "schedule.json"
    return {
        "group_sizes": best.group_sizes,
        "proximity_threshold": best.proximity_threshold,
        "repulsion_threshold": best.repulsion_threshold,
        **{name: found[name] for name in kept},
        "better": found["difference"]["high"] < 0,
        "flags": f"--schedule_file {path}",
    }


def main() -> None:
    parser = Parser(
        prog="python -m scripts.find_schedule",
        description="Group sizes and thresholds under which a model finds held-out images likeliest.",
    )
    parser.add_config(SearchConfig, {"output_dir": Path("runs/schedule")})
    config = from_args(SearchConfig, parser.parse_args())
    with distributed(config.device) as dist, FolderLock(config.output_dir) as lock:
        setup_logging(dist.rank)
        check_output_dir(config.output_dir)
        source = open_source(config, dist)
        dist.on_main(lock.acquire)
        best, found = find(config, source, dist)
        if dist.is_main:
            print(
                f"{len(best.group_sizes)} steps, on {found['confirmed_on']} images that the search has not seen: "
                f"{found['bits_per_token']['mean']:.4f} bits per token, the published schedule "
                f"{found['published_bits_per_token']['mean']:.4f}; difference {show(found['difference'])}"
            )
            print(json.dumps(summary(config, best, found)), flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
