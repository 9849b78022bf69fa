"""How likely a trained model finds held-out images under given orders and numbers of steps: exact, in seconds.

    python -m scripts.likelihood --pretrained_ckpt runs/demo/lpd/checkpoint-last.pth \\
        --vqgan_path runs/demo/tokenizer/tokenizer.pt --data_path runs/demo/digits/test \\
        --orders lpd random raster --steps 64 16 8 --output_dir runs/demo/likelihood

Run plainly or under torchrun; a killed run is resumed by the same command. Writes likelihood.json, table.md and plots,
and prints the table and, as the last line, a summary as JSON.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.evaluation.outputs import describe_environment
from engine.likelihood import plots
from engine.likelihood.cells import baselines, make_cells
from engine.likelihood.measure import Settings, measure
from engine.likelihood.report import rows, table, with_one_by_one
from engine.likelihood.source import Source, SourceConfig, open_source
from engine.run_config import RunConfig
from orders.schedule import default_steps
from util.cli import Parser, exit_on_user_error, from_args
from util.config import MAX_COUNT, record, setting
from util.dist import Dist, distributed
from util.files import atomic_write, check_output_dir, write_json
from util.folder_lock import FolderLock
from util.logger import setup_logging


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(SourceConfig, RunConfig):
    """Which schedules are compared on which images."""

    orders: tuple[str, ...] = setting(("lpd", "random", "raster"), "kinds, lpd:PROXIMITY:REPULSION, or files of orders")
    steps: tuple[str, ...] = setting(
        (), "numbers of steps, or what --group_sizes of main_lpd.py takes (default: 20 for 16×16 tokens, as published)"
    )
    schedule_files: tuple[Path, ...] = setting((), "files of scripts.find_schedule as well")
    orders_per_image: int = setting(
        1, "orders of each image, where they vary: narrower intervals", at_least=1, at_most=MAX_COUNT
    )
    baseline: str | None = setting(
        None, "an order, compared at the same steps, or ORDER/STEPS (default: the first order, or the first cell)"
    )
    conditions: tuple[str, ...] = setting(
        ("class",), "given the class, or none: without it; or both", choices=("class", "none")
    )
    one_by_one: bool = setting(True, "measure what parallel drawing loses: every order one by one too")


def compare(config: LikelihoodConfig, source: Source, dist: Dist) -> dict[str, Any]:
    """Measure all cells and write everything to the output folder; returns the content of ``likelihood.json``."""
    model = source.model.config
    conditions = [condition == "class" for condition in dict.fromkeys(config.conditions)]
    steps = config.steps or (str(default_steps(model.grid_size)),)
    cells = make_cells(config.orders, steps, config.schedule_files, model.grid_size, config.seed, conditions)
    compared_with = baselines(cells, config.baseline)
    decodings = with_one_by_one(cells, config.one_by_one)
    for file in (cell.decoding.orders for cell in cells):
        file.check_enough(len(source.images) * config.orders_per_image)
    settings = Settings(config.orders_per_image, config.bf16, config.batch_size)
    start, cpu_start = time.perf_counter(), time.process_time()
    measured = measure(source, decodings, settings, config.output_dir, dist)
    seconds, cpu_seconds = time.perf_counter() - start, sum(dist.gather(time.process_time() - cpu_start))
    found = rows(cells, compared_with, decodings, measured, model.img_size**2)
    results = {
        "num_images": len(source.images),
        "orders_per_image": config.orders_per_image,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all processes: less than threads × seconds where others compute too
        "passes_per_sec": measured.passes / seconds,
        "settings": record(config),
        "source": source.record,
        "environment": describe_environment(dist) | {"threads": torch.get_num_threads()},
        "cells": found,
    }

    def write() -> None:
        write_json(config.output_dir / "likelihood.json", results)
        with atomic_write(config.output_dir / "table.md") as file:
            file.write(table(found).encode())
        plots.draw(config.output_dir, found)

    dist.on_main(write)
    return results


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """What the last line says."""
    best = min(results["cells"], key=lambda row: row["bits_per_token"]["mean"])
    return {
        "num_images": results["num_images"],
        "cells": len(results["cells"]),
        "seconds": round(results["seconds"], 3),
        "cpu_seconds": round(results["cpu_seconds"], 3),
        "passes_per_sec": round(results["passes_per_sec"], 1),
        "threads": results["environment"]["threads"],
        "least_bits_per_token": {"name": best["name"], **best["bits_per_token"]},
        "results": str(Path(results["settings"]["output_dir"]) / "likelihood.json"),
    }


def main() -> None:
    parser = Parser(
        prog="python -m scripts.likelihood",
        description="The likelihood of held-out images under orders and numbers of steps: bits per token, exact.",
    )
    parser.add_config(LikelihoodConfig, {"output_dir": Path("runs/likelihood")})
    config = from_args(LikelihoodConfig, parser.parse_args())
    with distributed(config.device) as dist, FolderLock(config.output_dir) as lock:
        setup_logging(dist.rank)
        check_output_dir(config.output_dir)
        source = open_source(config, dist)
        dist.on_main(lock.acquire)
        results = compare(config, source, dist)
        if dist.is_main:
            print(table(results["cells"]), flush=True)
            print(json.dumps(summary(results)), flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
