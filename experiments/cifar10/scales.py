"""What the experiment trains and which cells it evaluates: in full, and small enough for a CPU."""

from __future__ import annotations

from experiments.cells import NAMES, Scale

IMG_SIZE, STRIDE = 32, 2  # 256 codes per image: the grid of the published 256 px models
ABLATION_STEPS = 20
PUBLISHED_ABLATION = (2, 1.0)  # repulsion and proximity that the paper finds best

_STATISTICS = {"reference": ("--batch_size", "250"), "floors": ("--batch_size", "250")}
_MAIN = ("lpd", "random", "halton")

FULL = Scale(
    img_size=IMG_SIZE,
    stride=STRIDE,
    flags={
        **_STATISTICS,
        "tokenizer": (
            "--stride", str(STRIDE), "--base_width", "64", "--z_channels", "128", "--codebook_size", "1024",
            "--code_dim", "8", "--steps", "3000", "--batch_size", "256", "--lr", "1e-3", "--ema", "0",
            "--eval_freq", "500", "--flip",
        ),
        "codes": ("--batch_size", "256", "--num_workers", "8"),
        "classifier": (
            "--arch", "resnet18", "--input_size", "64", "--epochs", "30", "--batch_size", "256", "--lr", "2e-3",
            "--shift", "0.1", "--rotate", "5", "--flip",
        ),
        "lpd": (
            "--model", "lpd_s", "--epochs", "18", "--batch_size", "128", "--lr", "8e-4", "--lr_schedule", "cosine",
            "--warmup_epochs", "1", "--proj_dropout", "0", "--save_last_freq", "4",
        ),
    },
    orders=tuple(NAMES),
    steps=(256, 64, 32, 20, 16, 12, 8),
    num_images=10_000,
    eval_bsz=2_500,
    cfgs=(1.0, 1.5, 2.0, 3.0, 4.0),
    tuning_images=2_500,
    tuning_steps=20,
    tuning_seed=1000,
    seeds=(0, 1, 2),
    repeated=(
        *((order, steps) for order in (*_MAIN, "raster") for steps in (256, 20)),
        *((order, steps) for order in _MAIN for steps in (32, 16, 12, 8)),
    ),
    ablation_steps=(ABLATION_STEPS,),
    repulsions=(0, 1, 2, 3, 4),
    proximities=(0.0, 1.0, 2.0),
)  # fmt: skip

TINY = Scale(
    img_size=IMG_SIZE,
    stride=STRIDE,
    flags={
        **_STATISTICS,
        "tokenizer": (
            "--stride", str(STRIDE), "--base_width", "8", "--res_blocks", "1", "--z_channels", "16",
            "--codebook_size", "32", "--code_dim", "4", "--steps", "30", "--batch_size", "8", "--lr", "4e-3",
            "--ema", "0", "--eval_freq", "30", "--num_workers", "0",
        ),
        "codes": ("--num_workers", "0"),
        "classifier": ("--epochs", "2", "--batch_size", "32", "--flip"),
        "lpd": (
            "--model", "lpd_debug", "--epochs", "2", "--batch_size", "20", "--lr", "2e-3", "--lr_schedule", "cosine",
            "--warmup_epochs", "0", "--num_workers", "0", "--log_freq", "5",
        ),
    },
    orders=tuple(NAMES),
    steps=(256, 20, 8),
    num_images=20,
    eval_bsz=10,
    cfgs=(1.0, 2.0),
    tuning_images=10,
    tuning_steps=8,
    tuning_seed=1000,
    seeds=(0, 1),
    repeated=(("lpd", 256), *((order, steps) for order in _MAIN for steps in (20, 8))),
    ablation_steps=(ABLATION_STEPS,),
    repulsions=(0, 2),
    proximities=(1.0,),
    subset=200,
)  # fmt: skip

SCALES = {"full": FULL, "tiny": TINY}
