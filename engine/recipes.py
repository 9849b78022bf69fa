"""The published runs, one row each (paper, tables 1 and 2; hub `mit-han-lab/lpd_*`). `--recipe NAME` picks a row.

A recipe is a set of defaults for the flags of `main_lpd.py`; any flag given beside it wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Expected:
    """Published figures of an evaluation row; latency at batch 1 and throughput at batch 64 on one A100, bf16."""

    fid: float
    inception_score: float
    latency_s: float
    images_per_sec: float


# Released weights; the names under which recipes look for them and for the tokenizer.
RELEASED = (("lpd_l", 256), ("lpd_xl", 256), ("lpd_xxl", 256), ("lpd_l", 512), ("lpd_xl", 512))
TOKENIZER = "checkpoints/vq_ds16_c2i.pt"


def checkpoint_path(model: str, img_size: int) -> str:
    return f"checkpoints/{model}_{img_size}.pth"


TRAIN_RECIPES: dict[str, dict[str, Any]] = {}
EVAL_RECIPES: dict[str, dict[str, Any]] = {}
EXPECTED: dict[str, Expected] = {}


def _train(model: str, img_size: int, batch_size: int, **flags: Any) -> None:
    # No vqgan_path: training on codes needs no tokenizer. A cache of codes that TOKENIZER cannot have made is refused.
    name = f"{model}_{img_size}"
    TRAIN_RECIPES[name] = {
        "model": model,
        "img_size": img_size,
        "batch_size": batch_size,
        "blr": 1e-4,
        "bf16": True,
        "use_cached": True,
        "cached_path": f"cached/imagenet_{img_size}",
        "output_dir": f"runs/{name}",
        **flags,
    }


# What is not here are the defaults of the flags.
_FROM_SCRATCH = {"epochs": 450, "warmup_epochs": 50, "lr_decay_start_epoch": 400}
_train("lpd_l", 256, 64, **_FROM_SCRATCH)  # 64 × 32 GPUs
_train("lpd_xl", 256, 32, **_FROM_SCRATCH)  # 32 × 32 GPUs
_train("lpd_xxl", 256, 32, **_FROM_SCRATCH)  # 32 × 32 GPUs
_CONTINUED = {"epochs": 50, "warmup_epochs": 1, "lr_schedule": "cosine"}
_train("lpd_l", 512, 16, **_CONTINUED, pretrained_ckpt=checkpoint_path("lpd_l", 256))  # 16 × 32 GPUs
_train("lpd_xl", 512, 8, **_CONTINUED, pretrained_ckpt=checkpoint_path("lpd_xl", 256))  # 8 × 32 GPUs


def _evaluate(model: str, img_size: int, steps: int, repulsion: int, cfg: float, expected: Expected) -> None:
    name = f"{model}_res{img_size}_steps{steps}"
    EVAL_RECIPES[name] = {
        "model": model,
        "img_size": img_size,
        "vqgan_path": TOKENIZER,
        "pretrained_ckpt": checkpoint_path(model, img_size),
        "generation_steps": steps,
        "repulsion_threshold": repulsion,
        "cfg": cfg,
        "bf16": True,
        "speed_runs": 500,  # after 100 of warm-up
        "reference_statistics": f"checkpoints/adm_in{img_size}_stats.npz",
        "output_dir": f"runs/eval/{name}",
    }
    EXPECTED[name] = expected


_evaluate("lpd_l", 256, 20, 2, 4.8, Expected(2.40, 284.5, 0.28, 139.11))
_evaluate("lpd_xl", 256, 20, 2, 4.9, Expected(2.10, 326.7, 0.41, 75.20))
_evaluate("lpd_xxl", 256, 20, 3, 5.9, Expected(2.00, 337.6, 0.55, 45.07))
_evaluate("lpd_l", 256, 32, 2, 5.4, Expected(2.29, 282.7, 0.46, 110.34))
_evaluate("lpd_xl", 256, 32, 2, 5.0, Expected(1.92, 319.4, 0.66, 61.24))
_evaluate("lpd_l", 512, 48, 4, 7.3, Expected(2.54, 292.2, 0.69, 35.16))
_evaluate("lpd_xl", 512, 48, 4, 6.0, Expected(2.10, 326.0, 1.01, 18.18))
