"""What the experiment trains and evaluates: on two CPU cores, in finer tokens, longer on a GPU, and in a test."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.cells import NAMES, Model, Scale

IMG_SIZE, STRIDE = 64, 8  # 64 codes per photo
EPOCHS = 48
MAIN = ("lpd", "random", "halton", "raster")
# How the trainings differ: uniformly random orders, as published, or locality-aware ones among them.
TRAININGS = {"lpd_random": ("--train_orders", "random:1"), "lpd_mixed": ("--train_orders", "random:0.5", "lpd:0.5")}
# How the pictures that somebody names are drawn: closer to the class than is best by distance.
NAMED_SAMPLING: dict[str, Any] = {"cfg": 6.0, "temperature": 0.85}
BALANCED = {"train": 100, "test": 16}  # photos of each class that statistics and floors are taken of

_STATISTICS = {"reference": ("--batch_size", "250"), "floors": ("--batch_size", "250")}
_CHECKPOINTS = (EPOCHS // 4, EPOCHS // 2)
_COMPARED = ("lpd", "random", "halton")  # at earlier checkpoints too


def _kept(training: str, epochs: tuple[int, ...], steps: tuple[int, ...]) -> tuple[Model, ...]:
    return tuple(Model(training, epoch, _COMPARED, steps) for epoch in epochs)


def _models(epochs: tuple[int, ...], steps: tuple[int, ...]) -> tuple[Model, ...]:
    return Model("lpd_random"), Model("lpd_mixed", orders=MAIN), *_kept("lpd_random", epochs, steps)


FULL = Scale(
    img_size=IMG_SIZE,
    stride=STRIDE,
    flags={
        **_STATISTICS,
        "tokenizer": (
            "--stride", str(STRIDE), "--base_width", "32", "--multipliers", "1", "2", "2", "3", "--res_blocks", "1",
            "--z_channels", "64", "--codebook_size", "1024", "--code_dim", "8", "--steps", "4500", "--batch_size", "16",
            "--lr", "1e-3", "--eval_freq", "450", "--flip", "--adversarial_weight", "0.5", "--adversarial_start", "0.4",
            "--disc_width", "32", "--bf16",
        ),
        "codes": ("--num_workers", "2"),
        "classifier": ("--epochs", "40", "--lr", "3e-3", "--shift", "0.1", "--rotate", "10", "--flip"),
        "lpd": (
            "--model", "lpd_mini", "--epochs", str(EPOCHS), "--batch_size", "32", "--lr", "1e-3", "--lr_schedule",
            "cosine", "--warmup_epochs", "2", "--proj_dropout", "0.1", "--ema", "0.999", "--val_freq", "4",
            "--save_intermediate_freq", str(EPOCHS // 4), "--bf16", "--no-compile",
        ),
    },
    trainings=TRAININGS,
    models=_models(_CHECKPOINTS, steps=(16, 4)),
    orders=tuple(NAMES),
    steps=(64, 32, 16, 8, 4),
    num_images=350,
    eval_bsz=175,
    cfgs=(1.0, 2.0, 3.0, 4.5),
    tuning_images=140,
    tuning_steps=16,
    tuning_seed=1000,
    seeds=(0, 1, 2),
    repeated=(
        *((order, steps) for order in _COMPARED for steps in (64, 16, 8, 4)),
        *(("raster", steps) for steps in (16, 4)),
    ),
    ablation_steps=(16, 8),
    repulsions=(0, 1, 2, 3),
    proximities=(0.0, 1.0, 2.0),
)  # fmt: skip

# In 16×16 = 256 tokens, as many as the paper's: a tokenizer that loses less, and four times the work per photo.
FINE_EPOCHS = 40
FINE = dataclasses.replace(
    FULL,
    variant="fine",
    stride=4,
    flags=FULL.flags
    | {
        "tokenizer": (
            "--stride", "4", "--base_width", "32", "--multipliers", "1", "2", "3", "--res_blocks", "1", "--z_channels",
            "64", "--codebook_size", "512", "--code_dim", "8", "--steps", "2700", "--batch_size", "16", "--lr", "1e-3",
            "--eval_freq", "300", "--flip", "--bf16",
        ),
        "lpd": (
            *FULL.flags["lpd"], "--epochs", str(FINE_EPOCHS), "--batch_size", "16", "--warmup_epochs", "1", "--ema",
            "0.998", "--save_intermediate_freq", str(FINE_EPOCHS // 4),
        ),
    },
    trainings={"lpd_mixed": TRAININGS["lpd_mixed"]},
    models=(Model("lpd_mixed"), *_kept("lpd_mixed", (FINE_EPOCHS // 4, FINE_EPOCHS // 2), steps=(20,))),
    orders=MAIN,
    steps=(256, 64, 20, 12, 8),
    cfgs=(2.0, 3.0, 4.5, 6.0, 8.0),
    tuning_steps=20,
    repeated=tuple((order, steps) for order in _COMPARED for steps in (20, 8)),
    ablation_steps=(),
)  # fmt: skip

# FULL with ten times the training and more images.
GPU = dataclasses.replace(
    FULL.for_epochs(10 * EPOCHS),
    flags=FULL.for_epochs(10 * EPOCHS).flags
    | {"tokenizer": (*FULL.flags["tokenizer"], "--steps", "10000", "--batch_size", "64")},
    num_images=3500,
    eval_bsz=1750,
    tuning_images=1050,
)

TINY = Scale(
    flags={
        **_STATISTICS,
        "tokenizer": (
            "--stride", str(STRIDE), "--base_width", "8", "--res_blocks", "1", "--z_channels", "16",
            "--codebook_size", "32", "--code_dim", "4", "--steps", "6", "--batch_size", "8", "--lr", "4e-3",
            "--eval_freq", "6", "--num_workers", "0",
        ),
        "codes": ("--num_workers", "0"),
        "classifier": ("--epochs", "1", "--batch_size", "16", "--flip"),
        "lpd": (
            "--model", "lpd_debug", "--epochs", "2", "--batch_size", "10", "--lr", "2e-3", "--lr_schedule", "cosine",
            "--warmup_epochs", "0", "--num_workers", "0", "--log_freq", "5", "--save_intermediate_freq", "1",
        ),
    },
    trainings=TRAININGS,
    models=_models((1,), steps=(4,)),
    img_size=IMG_SIZE,
    stride=STRIDE,
    orders=("lpd", "random", "halton", "raster", "par"),
    steps=(16, 4),
    num_images=6,
    eval_bsz=3,
    cfgs=(1.0, 2.0),
    tuning_images=6,
    tuning_steps=4,
    tuning_seed=1000,
    seeds=(0, 1),
    repeated=(("lpd", 4), ("random", 4)),
    ablation_steps=(4,),
    repulsions=(0, 1),
    proximities=(1.0,),
    subset=40,
)  # fmt: skip

SCALES = {"full": FULL, "fine": FINE, "gpu": GPU, "tiny": TINY}
