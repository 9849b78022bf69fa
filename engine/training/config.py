"""How a model is trained; the defaults are the published recipe of LPD-L at 256 px.

Of another number of epochs warm-up and decay take the same shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.run_config import RunConfig
from engine.training.trackers import TrackerConfig
from orders.config import parse_shares
from util.config import MAX_WORKERS, check, part, setting
from util.data.classes import ClassChoice
from util.errors import UserError
from util.lr_sched import LR_SCHEDULES

ATTENTIONS = ("auto", "sdpa", "flex")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a training reads."""

    data_path: Path | None = setting(
        None, "images: a folder with a subfolder per class, a list photos.csv, or photos.npz[:train] (docs/training.md)"
    )
    use_cached: bool = setting(False, "train on the codes in --cached_path instead of images")
    cached_path: Path | None = setting(None, "code cache made by main_cache.py")
    verify_cache: bool = setting(False, "compare caches with their check sums, even if they look unchanged")
    skip_broken: bool = setting(False, "leave out images that cannot be read")
    val_path: Path | None = setting(
        None, "images that are not trained on, like --data_path: their loss is measured during training (val_loss)"
    )
    val_cached_path: Path | None = setting(None, "a code cache of such images instead")
    choice: ClassChoice = part(default_factory=ClassChoice)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A training run, whatever the model and the data.

    Raises:
        UserError: for settings out of range, or that contradict each other.
    """

    epochs: int = setting(450, "passes over the data", at_least=1)
    batch_size: int = setting(64, "samples per process (and part, with --grad_accum)", at_least=1)
    grad_accum: int = setting(1, "parts of a step whose gradients are added up: less memory", at_least=1)
    lr: float | None = setting(None, "peak learning rate (default: see --blr)", above=0)
    blr: float | None = setting(
        None, "learning rate per 256 samples of the global batch (default: 1e-4, and of fewer samples as much)", above=0
    )
    min_lr: float = setting(1e-5, "learning rate at the end of a cosine", at_least=0)
    lr_schedule: str = setting("constant+cosine", "what follows the warm-up", choices=LR_SCHEDULES)
    # Numbers once constructed, whether they were given or not.
    warmup_epochs: float = setting(
        None, "epochs in which the learning rate rises from 0 (default: a ninth of --epochs)", at_least=0
    )
    lr_decay_start_epoch: float = setting(
        None, "where the cosine of constant+cosine starts (default: after eight ninths of --epochs)", at_least=0
    )
    weight_decay: float = setting(0.02, "on parameters of two and more dimensions", at_least=0)
    grad_clip: float = setting(3.0, "largest norm of the gradient", above=0)
    ema: float = setting(0.0, "decay of a moving average of the weights, such as 0.9999; 0: none", at_least=0, below=1)
    flip_prob: float = setting(0.5, "share of samples mirrored; 0 for pictures such as text", at_least=0, at_most=1)
    group_sizes_list: Path | None = setting(
        None, "JSON file with a list of schedules to draw from (default: the published ones of the resolution)"
    )
    train_orders: tuple[str, ...] = setting(
        ("random:1",),
        "kinds of training orders and their shares, such as random:0.5 lpd:0.5 (default: random:1, as published)",
    )
    attention: str = setting("auto", "flex needs a GPU; auto: flex where it can be used", choices=ATTENTIONS)
    compile: bool | None = setting(None, "compile the training step (default: on a GPU, not on a CPU)")
    fsdp: bool = setting(False, "shard weights and optimizer over the processes (FSDP2): less memory")
    num_workers: int = setting(
        8, "processes that load images; the code cache needs none", at_least=0, at_most=MAX_WORKERS
    )
    resume: Path | None = setting(None, "checkpoint, or folder of checkpoints, where --output_dir holds none yet")
    log_freq: int = setting(50, "steps between lines of metrics.jsonl", at_least=1)
    save_last_freq: int = setting(1, "epochs between saves of checkpoint-last.pth", at_least=1)
    save_last_steps: int = setting(0, "steps between saves as well, for long epochs; 0: none", at_least=0)
    keep_last: int = setting(2, "newest checkpoints to keep, should the last one get damaged", at_least=1, at_most=1000)
    save_intermediate_freq: int = setting(0, "epochs between checkpoints that are kept; 0: none", at_least=0)
    online_eval: bool = setting(False, "evaluate during training and at its end")
    val_freq: int = setting(
        1, "epochs between measurements of the validation loss, after the last as well; 0: only then", at_least=0
    )
    eval_freq: int = setting(40, "epochs between evaluations with --online_eval; 0: only at the end", at_least=0)
    sample_freq: int = setting(0, "epochs between pictures of the same samples; 0: none", at_least=0)
    max_steps: int = setting(
        0, "stop after this step, without evaluating; 1 tries a command out; 0: after all epochs", at_least=0
    )
    trackers: TrackerConfig = part(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        check(self)
        parse_shares(self.train_orders)
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", self.epochs / 9)
        if self.lr_decay_start_epoch is None:
            object.__setattr__(self, "lr_decay_start_epoch", max(self.epochs * 8 / 9, self.warmup_epochs))
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup_epochs is {self.warmup_epochs:g}; it must be at most --epochs, {self.epochs}.")
        decay_start = self.lr_decay_start_epoch
        if self.lr_schedule == "constant+cosine" and not self.warmup_epochs <= decay_start <= self.epochs:
            raise UserError(
                f"--lr_decay_start_epoch is {decay_start:g}; with --lr_schedule constant+cosine it must lie between "
                f"--warmup_epochs {self.warmup_epochs:g} and --epochs {self.epochs}."
            )

    def global_batch(self, world_size: int) -> int:
        """Samples of one step over all processes."""
        return self.batch_size * self.grad_accum * world_size

    def peak_lr(self, world_size: int) -> float:
        """Highest learning rate. Where it is below `min_lr` (few GPUs), the learning rate doesn't fall."""
        if self.lr is not None:
            return self.lr
        batch = self.global_batch(world_size)
        # Proportional to a small batch, the published 1e-4 would be too low to learn with.
        return 1e-4 * max(batch, 256) / 256 if self.blr is None else self.blr * batch / 256
