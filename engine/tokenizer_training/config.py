"""The settings of a tokenizer's training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from util.config import check, setting


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How to train. The learning rate rises to ``lr``, then falls to 0. UserError for a setting out of its range."""

    steps: int = setting(help="optimizer steps; more than before extend a finished training", at_least=1)
    batch_size: int = setting(64, "images per step", at_least=1, at_most=2**16)
    lr: float = setting(1e-3, "highest learning rate", above=0)
    eval_freq: int = setting(500, "measure and save every N steps", at_least=1)
    held_out: float = setting(0.1, "share of the images kept for measuring", above=0, below=1)
    flip: bool = setting(False, "mirror half of the training images at random")
    ema: float = setting(
        0.999, "decay of the average of the weights, which is what is saved; 0: the last weights", at_least=0, below=1
    )
    adversarial_weight: float = setting(
        0.0, "weight of the adversarial loss, which makes pictures sharp; LlamaGen's is 0.5", at_least=0
    )
    adversarial_start: float = setting(0.3, "share of the steps after which it begins", at_least=0, below=1)
    disc_width: int = setting(64, "channels of the discriminator's first layer", at_least=1)
    disc_lr: float = setting(2e-4, "its highest learning rate, which falls with the other", above=0)
    lpips_path: tuple[Path, ...] = setting((), "weights of the perceptual loss LPIPS (one or two files)")
    lpips_weight: float = setting(1.0, "weight of the perceptual loss", at_least=0)
    vqgan_path: Path | None = setting(None, "start from this tokenizer, LlamaGen's or one of this command")
    bf16: bool = setting(False, "bfloat16 autocast: faster on GPUs, and on processors that have it")
    num_workers: int = setting(0, "image readers", at_least=0)
    seed: int = setting(0, "of the split, the weights and the batches", at_least=0, below=2**32)

    def __post_init__(self) -> None:
        check(self)
