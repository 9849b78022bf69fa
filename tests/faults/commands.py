"""The commands under attack: a valid command line of each on tiny inputs, and what of its results is compared.

To add a command: a line in COMMANDS; those of experiments and publication stand in `published`. Bad flags are made from
its own parser.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import engine.cache
import engine.classifier
import engine.evaluation.compare
import engine.evaluation.results_table
import engine.hub.__main__
import engine.metrics
import main_cache
import main_lpd
import orders.__main__
import scripts.app.__main__
import scripts.benchmark_cache
import scripts.benchmark_evaluation
import scripts.benchmark_latency
import scripts.benchmark_orders
import scripts.benchmark_train
import scripts.edit
import scripts.find_schedule
import scripts.generate
import scripts.likelihood
import scripts.plots
import scripts.tune_kernels
import tokenizers.train
from engine.evaluation import partial_results
from tests.faults.published import (
    PUBLISHED,
    keep_to_the_inputs,
    write_finished_experiment,
    write_published_inputs,
)
from tests.faults.results import (
    Command,
    codes,
    compared,
    drawn,
    exported,
    generated_orders,
    likelihood,
    nothing,
    pictures,
    printed_scores,
    schedule,
    scores,
    statistics,
    weights,
)
from tests.faults.worker import Running, call, compute, patched
from tests.helpers.tiny_models import tiny_tokenizer, write_images
from tokenizers import save_tokenizer
from util.checkpoint import LAST
from util.cli import Parser
from util.data.images import write_image_archive

SIZE, CLASSES = 16, {"ant": 5, "bee": 7}


_TRAIN = "--use_cached --cached_path codes --model lpd_debug --device cpu --epochs 4 --batch_size 4 --lr 1e-3"
_EVALUATE = (
    "--evaluate --vqgan_path tokenizer.pt --device cpu --generation_steps 4 --num_images 8 --eval_bsz 2 --cfg 2 "
    "--feature_extractor classifier.pt --reference_statistics reference.npz --save_images"
)
_TOKENIZER = "--img_size 16 --stride 4 --base_width 8 --res_blocks 1 --z_channels 8 --codebook_size 12 --code_dim 4"
_HELD_OUT = f"--pretrained_ckpt run/{LAST} --cached_path codes --device cpu"
_PICTURES = f"--pretrained_ckpt run/{LAST} --vqgan_path tokenizer.pt --device cpu --output_dir OUT"
_METRICS = "--data_path pictures --img_size 16 --feature_extractor classifier.pt --device cpu"

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "train", main_lpd.main,
            f"{_TRAIN} --output_dir OUT --save_last_steps 2 --num_workers 0 --log_freq 1",
            lambda out, said: weights(out / LAST), until="checkpoint-last-1.pth",
        ),
        Command(
            "train on pictures", main_lpd.main,
            "--data_path pictures --img_size 16 --vqgan_path tokenizer.pt --model lpd_debug --device cpu --epochs 1 "
            "--batch_size 6 --num_workers 0 --output_dir OUT",
            lambda out, said: weights(out / LAST),
        ),
        Command(
            "train from a checkpoint", main_lpd.main,
            f"{_TRAIN} --pretrained_ckpt run/{LAST} --epochs 1 --group_sizes_list schedules.json --output_dir OUT",
            lambda out, said: weights(out / LAST),
        ),
        Command(
            "evaluate", main_lpd.main, f"{_EVALUATE} --pretrained_ckpt run/{LAST} --output_dir OUT", scores,
            until="partial-*/part_*.npz",
        ),
        Command(
            "evaluate an export", main_lpd.main,
            f"{_EVALUATE} --pretrained_ckpt exported --lpd_order_file orders.safetensors --output_dir OUT", scores,
        ),
        Command(
            "evaluate with files", main_lpd.main,
            f"{_EVALUATE} --pretrained_ckpt exported --lpd_order_file orders.json --group_sizes sizes.json "
            "--output_dir OUT", scores,
        ),
        Command(
            "evaluate a schedule", main_lpd.main,
            f"{_EVALUATE} --pretrained_ckpt exported --schedule_file found/schedule.json --output_dir OUT", scores,
        ),
        Command(
            "cache", main_cache.main,
            "--data_path pictures --vqgan_path tokenizer.pt --img_size 16 --cached_path OUT --device cpu --batch_size "
            "2 --num_workers 0", codes, until=".parts/*.npz",
        ),
        Command(
            "cache an archive", main_cache.main,
            "--data_path pictures.npz:train --vqgan_path tokenizer.safetensors --img_size 16 --cached_path OUT "
            "--device cpu --num_workers 0", codes,
        ),
        Command(
            "cache a list", main_cache.main,
            "--data_path list.csv --class_names names.json --vqgan_path tokenizer.pt --img_size 16 --cached_path OUT "
            "--device cpu --num_workers 0", codes,
        ),
        Command(
            "convert a cache", main_cache.main,
            "--convert_from published --vqgan_path tokenizer.pt --img_size 16 --cached_path OUT --device cpu "
            "--num_workers 0", codes,
        ),
        Command(
            "tokenizers.train", tokenizers.train.main,
            f"--data_path pictures --test_path pictures --output_dir OUT {_TOKENIZER} --steps 8 --batch_size 4 "
            "--eval_freq 2 --num_workers 0 --device cpu",
            lambda out, said: weights(out / "tokenizer.pt"), until="state.pth",
        ),
        Command(
            "classifier", engine.classifier.main,
            "--data_path pictures --test_path pictures --img_size 16 --epochs 4 --batch_size 4 --device cpu "
            "--output OUT/classifier.pt", lambda out, said: weights(out / "classifier.pt"),
            until="classifier.pt.state.pth",
        ),
        Command("metrics", engine.metrics.main, f"{_METRICS} --reference_statistics reference.npz", printed_scores),
        Command("statistics", engine.metrics.main, f"{_METRICS} --output OUT/statistics.npz", statistics),
        Command(
            "hub export", engine.hub.__main__.main, f"export run/{LAST} OUT --vqgan_path tokenizer.pt", exported
        ),
        Command(
            "hub download", engine.hub.__main__.main, "download orders", nothing, measures=True
        ),
        Command(
            "orders generate", orders.__main__.main, "generate OUT/o.json --grid 4 --steps 4 --num 20 --workers 1",
            generated_orders("o.json"),
        ),
        Command(
            "orders convert", orders.__main__.main, "convert orders.json OUT/o.safetensors --grid 4",
            generated_orders("o.safetensors"),
        ),
        Command(
            "orders stats", orders.__main__.main, "stats --file orders.safetensors --grid 4 --steps 4 --num 20",
            lambda out, said: said.split("\n", 1)[1],
        ),
        *(
            Command(f"orders {name}", orders.__main__.main, f"{name} OUT/picture.{kind} --grid 4 --steps 4", nothing)
            for name, kind in (("draw", "png"), ("compare", "png"), ("animate", "gif"))
        ),
        Command(
            "results table", engine.evaluation.results_table.main, "evaluated/results.json evaluated/results.jsonl "
            "--output OUT/table.md", lambda out, said: said,
        ),
        Command(
            "compare", engine.evaluation.compare.main,
            f"--pretrained_ckpt run/{LAST} --vqgan_path tokenizer.pt --orders lpd --steps 4 2 --num_images 8 "
            "--eval_bsz 4 --cfg 2 --feature_extractor classifier.pt --reference_statistics reference.npz --save_images "
            "--device cpu --output_dir OUT", compared,
        ),
        Command(
            "likelihood", scripts.likelihood.main,
            f"{_HELD_OUT} --orders lpd random --steps 4 2 --batch_size 2 --output_dir OUT", likelihood,
            until="partial-*/part_*.npz",
        ),
        Command(
            "find_schedule", scripts.find_schedule.main,
            f"{_HELD_OUT} --generation_steps 4 --budget_sec 0.2 --output_dir OUT", schedule,
        ),
        Command("generate", scripts.generate.main, f"{_PICTURES} --classes ant 1 --steps 4", pictures),
        Command(
            "edit", scripts.edit.main, f"{_PICTURES} --image pictures/ant/photo.jpg --box 0,0,8,16 --class bee",
            pictures,
        ),
        Command("edit codes", scripts.edit.main, f"{_PICTURES} --codes picture.npy --mask mask.png", pictures),
        Command("plots loss", scripts.plots.main, "loss run --output OUT/loss.png", drawn("loss.png")),
        Command("plots quality", scripts.plots.main, "quality evaluated --output OUT/fid.png", drawn("fid.png")),
        Command(
            "plots attention", scripts.plots.main,
            f"attention --pretrained_ckpt run/{LAST} --vqgan_path tokenizer.pt --cached_path codes --steps 4 "
            "--num_images 4 --device cpu --output OUT/attention.png", drawn("attention.png"),
        ),
        Command(
            "app", scripts.app.__main__.main,
            f"--pretrained_ckpt run/{LAST} --vqgan_path tokenizer.pt --device cpu", nothing, measures=True,
        ),
        *PUBLISHED,
        *(
            Command(f"benchmark {name}", module.main, "--output OUT/figures.json", nothing, measures=True)
            for name, module in {
                "cache": scripts.benchmark_cache, "evaluation": scripts.benchmark_evaluation,
                "latency": scripts.benchmark_latency, "orders": scripts.benchmark_orders,
                "train": scripts.benchmark_train, "kernels": scripts.tune_kernels,
            }.items()
        ),
    )
}  # fmt: skip


class _Parser(Exception):
    """Carries the parser of a command out of it."""


def parser_of(command: Command) -> argparse.ArgumentParser:
    """The parser by which a command reads its flags; for one with subcommands that of the subcommand."""

    def give(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Parser(parser)

    with patched(Parser, "parse_args", give):
        try:
            command.main()
        except _Parser as found:
            parser: argparse.ArgumentParser = found.args[0]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[command.arguments.split()[0]]
    return parser


def _write_inputs() -> None:
    """The inputs that no command makes."""
    write_images(Path("pictures"), CLASSES, SIZE + 4, SIZE)
    files = sorted(Path("pictures").rglob("*.png"))
    labels = [sorted(CLASSES).index(path.parent.name) for path in files]
    Image.open(files[0]).save(Path("pictures/ant/photo.jpg"))
    write_image_archive(
        "pictures.npz", [path.read_bytes() for path in files], labels, sorted(CLASSES), [0, 1, *[0] * (len(files) - 2)]
    )
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer, "tokenizer.pt")
    save_tokenizer(tokenizer, "tokenizer.safetensors")
    rng = np.random.default_rng(0)
    for name, count in CLASSES.items():
        Path("published", name).mkdir(parents=True)
        for number in range(count):
            indices, flipped = rng.integers(0, 12, (2, 16))
            np.savez(Path("published", name, f"{number}.npz"), indices=indices, indices_flip=flipped)
    listed = [f"{path},{path.parent.name}\n" for path in files]
    Path("list.csv").write_text("".join(["image,class\n", *listed]))
    Path("names.json").write_text(json.dumps({name: f"a {name}" for name in CLASSES}))
    np.save("picture.npy", rng.integers(0, 12, (4, 4)))
    Image.new("RGB", (SIZE, SIZE), "white").save("mask.png")
    Path("sizes.json").write_text("[1, 4, 5, 6]")
    Path("schedules.json").write_text("[[1, 3, 5, 7], [1, 15]]")


def make_inputs(folder: Path) -> None:
    """A folder with all inputs, made by the commands themselves where they can be."""
    folder.mkdir(parents=True)
    compute(_write_inputs, folder)
    compute(write_published_inputs, folder)
    for name, arguments in (
        ("cache", "--cached_path codes"),
        ("train", "--output_dir run"),
        ("hub export", f"export run/{LAST} exported --vqgan_path tokenizer.pt"),
        ("classifier", "--output classifier.pt"),
        ("statistics", "--output reference.npz"),
        ("orders generate", "generate orders.json --grid 4 --steps 4 --num 20"),
        ("orders convert", "convert orders.json orders.safetensors --grid 4"),
        ("evaluate", "--output_dir evaluated"),
        ("find_schedule", "--output_dir found"),
        ("likelihood", "--output_dir likelihood"),
    ):
        command = COMMANDS[name]
        flags = arguments.split()
        subcommand = not flags[0].startswith("-")
        words = flags if subcommand else [*command.words(folder / "unused"), *flags]
        ended = call(command.main, words, folder)
        if ended.status != 0:
            raise RuntimeError(f"{name} {words}: status {ended.status}\n{ended.err}")
    compute(write_finished_experiment, folder)


def stop_in_the_middle(command: Command, inputs: Path, out: Path, patterns: Iterable[str] = ()) -> None:
    """Start a command and kill it as soon as it has left what can be resumed from, and files of these patterns."""
    assert command.until is not None
    wanted = (command.until, *patterns)

    def there() -> bool:
        return all(any(out.glob(pattern)) for pattern in wanted)

    for _ in range(20):
        running = Running(command.main, command.words(out), inputs)
        while not running.ended(0.002) and not there():
            pass
        killed = not running.ended(0)
        running.kill()
        running.result()
        if killed and there():  # it may just have ended its work, and removed that
            return
        shutil.rmtree(out)
    raise RuntimeError(f"{command.name} was always faster than the kill")


def prepare_process() -> None:
    """What the commands work with is imported here, once; evaluations and caches get parts of a few images.

    Nothing of this leaves the folders of the harness.
    """
    import matplotlib.figure  # noqa: F401
    import timm  # noqa: F401
    import torch._dynamo

    torch.set_num_threads(1)
    # Bars of started commands would share a lock with this process's, and a killed one would never give it back.
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    partial_results.SAVE_INTERVAL_S = 0.0
    engine.cache.PART_SIZE = 4
    keep_to_the_inputs()
