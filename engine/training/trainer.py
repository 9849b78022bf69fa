"""The training loop: one process or many, resumable at any step.

Everything random about a step is a function of (seed, step, sample's row in the global batch), so a run resumed at step
k goes on exactly as if it had never stopped, and the numbers of processes and of parts of a step change nothing but the
dropout masks.

Shape legend: `B` samples of this process, `L` tokens of an image.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.training.checkpoint_writer import CheckpointWriter
from engine.training.monitor import Monitor
from engine.training.step import ATTENTIONS, Part, TrainStep, draw_samples, mirrored_codes
from engine.training.stop import StopRequest
from engine.training.trackers import Tracker
from models.flops import training_flops
from models.lpd import LPD
from tokenizers import VQModel
from util.data.codes import CodeDataset
from util.data.images import ImageDataset
from util.data.loading import load_batches
from util.data.sampler import GlobalBatchSampler
from util.dist import Dist
from util.errors import UserError
from util.lr_sched import LR_SCHEDULES, learning_rate

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the published recipe of LPD-L at 256 px.

    `lr` None means blr · global batch / 256. `batch_size` counts samples per process and part of a step, of which there
    are `grad_accum`. `compile` None means on a GPU only. `ema` is a decay, 0 none. Frequencies are in epochs (0 =
    never) except `log_freq` and `save_last_steps`, in steps. `max_steps` ends the run early (0 = after all epochs).
    `keep_last` counts the newest states on disk.
    """

    output_dir: Path
    epochs: int = 450
    batch_size: int = 64
    grad_accum: int = 1
    lr: float | None = None
    blr: float = 1e-4
    min_lr: float = 1e-5
    lr_schedule: str = "constant+cosine"
    warmup_epochs: float = 50
    lr_decay_start_epoch: float = 400
    weight_decay: float = 0.02
    grad_clip: float = 3.0
    ema: float = 0.0
    flip_prob: float = 0.5
    bf16: bool = False
    attention: str = "auto"
    compile: bool | None = None
    fsdp: bool = False
    seed: int = 0
    num_workers: int = 8
    log_freq: int = 50
    save_last_freq: int = 1
    save_last_steps: int = 0
    keep_last: int = 2
    save_intermediate_freq: int = 0
    sample_freq: int = 0
    eval_freq: int = 0
    max_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum", "log_freq", "save_last_freq", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        frequencies = ("save_last_steps", "save_intermediate_freq", "sample_freq", "eval_freq")
        for name in (*frequencies, "max_steps", "num_workers", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("lr", "blr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} is {value}; it must be positive.")
        for name in ("min_lr", "weight_decay", "warmup_epochs", "lr_decay_start_epoch"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be a number of at least 0.")
        if self.seed >= 2**63:
            raise UserError(f"--seed is {self.seed}; it must be below 2^63.")
        if not 0 <= self.flip_prob <= 1:
            raise UserError(f"--flip_prob is {self.flip_prob}; it must be a probability between 0 and 1.")
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema is {self.ema}; it must be 0 (off) or a decay below 1, such as 0.9999.")
        if self.attention not in ATTENTIONS:
            raise UserError(f"--attention is {self.attention!r}; choose one of {', '.join(ATTENTIONS)}.")
        if self.lr_schedule not in LR_SCHEDULES:
            raise UserError(f"--lr_schedule is {self.lr_schedule!r}; choose one of {', '.join(LR_SCHEDULES)}.")
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup_epochs is {self.warmup_epochs}; it must be at most --epochs, {self.epochs}.")
        decay_start = self.lr_decay_start_epoch
        if self.lr_schedule == "constant+cosine" and not self.warmup_epochs <= decay_start <= self.epochs:
            raise UserError(
                f"--lr_decay_start_epoch is {decay_start}; with --lr_schedule constant+cosine it must lie between "
                f"--warmup_epochs {self.warmup_epochs} and --epochs {self.epochs}."
            )

    def global_batch(self, world_size: int) -> int:
        """Samples of one step over all processes."""
        return self.batch_size * self.grad_accum * world_size

    def peak_lr(self, world_size: int) -> float:
        """Highest learning rate. Where it is below `min_lr` (few GPUs), the learning rate doesn't fall."""
        return self.lr if self.lr is not None else self.blr * self.global_batch(world_size) / 256


def train(
    model: LPD,
    dataset: CodeDataset | ImageDataset,
    schedules: Sequence[Sequence[int]],
    config: TrainConfig,
    dist: Dist,
    *,
    tokenizer: VQModel | None = None,
    resume: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    evaluate: Callable[[LPD, int], None] | None = None,
    draw_grid: Callable[[LPD], Image.Image | None] | None = None,
    trackers: Sequence[Tracker] = (),
) -> int | None:
    """Train `model` on uniformly random orders, one schedule of group sizes drawn per step (paper, section 3.2).

    Writes `checkpoint-last.pth` (and what it was before, `checkpoint-last-1.pth` …), `checkpoint-<epoch>.pth`,
    `metrics.jsonl` and `samples/` into the output folder (rank 0).

    Args:
        schedules: group sizes to draw from, each summing to L.
        tokenizer: encodes images; not needed for cached codes.
        resume: a checkpoint of an earlier run of this one; its `model` is loaded already. It is emptied once it is
            loaded, so that it does not stay in memory.
        metadata: plain data stored in every checkpoint (settings, class names, tokenizer hash).
        evaluate: called as (model, epoch) every `eval_freq` epochs and after the last, on all processes; once more when
            a run is resumed just there, since it may have been killed in the middle.
        draw_grid: called as (model) every `sample_freq` epochs, on all processes; rank 0 returns the picture to keep.
        trackers: get what `metrics.jsonl` and the folder `samples` get, on rank 0.

    Returns:
        None when finished, or the number of the signal that stopped the run after saving.

    Raises:
        UserError: for a data set smaller than one global batch, a checkpoint that does not fit or has trained for
            longer, or a last state that can't be written.
        FloatingPointError: when the loss is no longer finite; the last good checkpoint is kept.
    """
    device, L = dist.device, model.config.num_tokens
    global_batch = config.global_batch(dist.world_size)

    def sampler(start: int, num_steps: int) -> GlobalBatchSampler:
        return GlobalBatchSampler(len(dataset), global_batch, dist.rank, dist.world_size, config.seed, start, num_steps)

    train_step = TrainStep(
        model,
        dist,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        bf16=config.bf16,
        grad_accum=config.grad_accum,
        attention=config.attention,
        compiled=device.type == "cuda" if config.compile is None else config.compile,
        fsdp=config.fsdp,
        ema=config.ema,
    )
    start_step = 0
    # What the number of a step means; a checkpoint counts its steps in these.
    counted_in = {"global_batch": global_batch, "num_samples": len(dataset), "seed": config.seed}
    if resume is not None:
        for name, value in counted_in.items():
            if resume[name] != value:
                flags = " (--batch_size × --grad_accum × processes)" if name == "global_batch" else ""
                raise UserError(
                    f"the checkpoint is of a run with {name} {resume[name]}{flags}, this one has {value}; go on with "
                    "the same, or start anew from its weights with --pretrained_ckpt."
                )
        train_step.load(resume)
        start_step = resume["step"]
        resume.clear()
    steps_per_epoch = sampler(0, 0).steps_per_epoch
    total_steps = config.epochs * steps_per_epoch
    if start_step > total_steps:
        raise UserError(
            f"--epochs is {config.epochs}, but the checkpoint has {start_step / steps_per_epoch:.4g} epochs behind it; "
            "give more epochs or another --output_dir."
        )
    last_step = min(total_steps, config.max_steps or total_steps)
    peak_lr = config.peak_lr(dist.world_size)
    min_lr = min(config.min_lr, peak_lr)
    if dist.is_main and config.lr_schedule != "constant" and min_lr < config.min_lr:
        logger.warning(
            "the peak learning rate, %.3g, is below --min_lr %g; it will stay at the peak instead of falling",
            peak_lr, config.min_lr,
        )  # fmt: skip
    logger.info(
        "%d samples, %d steps per epoch, global batch %d, peak learning rate %.3g, steps %d to %d",
        len(dataset), steps_per_epoch, global_batch, peak_lr, start_step, last_step,
    )  # fmt: skip
    encoder = None if isinstance(dataset, CodeDataset) else tokenizer

    def sample_parts(step: int, data: list[torch.Tensor], labels: torch.Tensor) -> Iterator[Part]:
        """This process's samples of a step, a contiguous share of the global batch, in parts."""
        first = dist.rank * len(labels)
        for start in range(0, len(labels), config.batch_size):
            part = slice(start, start + config.batch_size)
            rows = range(first + part.start, first + part.stop)
            orders, flip, label_drop = draw_samples(
                config.seed, step, rows, L, config.flip_prob, model.config.label_drop_prob, device
            )
            yield mirrored_codes([tensor[part] for tensor in data], flip, encoder), labels[part], orders, label_drop

    def save(step: int, keep: bool) -> None:
        state = train_step.state()  # by all processes
        epoch = step // steps_per_epoch
        state |= {"step": step, "epoch": epoch, "config": dataclasses.asdict(model.config)}
        writer.save(state | counted_in | (metadata or {}), epoch if keep else None)

    def check_saved() -> None:
        if failure := dist.broadcast(writer.wait()):
            raise UserError(
                f"the run ends without its last state: {failure}; make room and run the same command again, it goes on "
                "from the checkpoint before."
            )

    def due(epoch: int, frequency: int) -> bool:
        return epoch == config.epochs or (frequency > 0 and epoch % frequency == 0)

    def after_epoch(epoch: int) -> None:
        """Pictures and evaluation, after saving."""
        with monitor.paused():
            if draw_grid is not None and config.sample_freq and due(epoch, config.sample_freq):
                picture = draw_grid(train_step.evaluation_model())
                if picture is not None:
                    monitor.picture("samples", picture, epoch)
            if evaluate is not None and due(epoch, config.eval_freq):
                writer.wait()
                told = next(filter(None, dist.gather(stop.signal)), None)  # came after the agreement of the last step
                if told is not None:
                    check_saved()
                with stop.suspended(told):
                    evaluate(train_step.evaluation_model(), epoch)

    model.train()
    with (
        StopRequest() as stop,
        CheckpointWriter(config.output_dir if dist.is_main else None, config.keep_last, start_step) as writer,
        Monitor(
            config.output_dir,
            dist,
            start_step=start_step,
            total_steps=last_step,
            steps_per_epoch=steps_per_epoch,
            global_batch=global_batch,
            flops_per_image=training_flops(model.config),
            samples_of=lambda step: next(iter(sampler(step, 1))),
            trackers=trackers,
        ) as monitor,
    ):
        if start_step and start_step % steps_per_epoch == 0 and (start_step < last_step or last_step == total_steps):
            after_epoch(start_step // steps_per_epoch)  # once more: it may have been killed in the middle
        remaining = sampler(start_step, max(0, last_step - start_step))
        batches = load_batches(dataset, remaining, config.num_workers, device)
        for step, (*data, labels) in enumerate(monitor.waiting(batches), start=start_step):
            lr = learning_rate(
                step / steps_per_epoch,
                schedule=config.lr_schedule,
                lr=peak_lr,
                min_lr=min_lr,
                warmup_epochs=config.warmup_epochs,
                epochs=config.epochs,
                lr_decay_start_epoch=config.lr_decay_start_epoch,
            )
            draws = np.random.default_rng([config.seed, step])
            group_sizes = schedules[int(draws.integers(len(schedules)))]
            torch.manual_seed(int(draws.integers(2**62)) + dist.rank)  # dropout
            monitor.add(*train_step(sample_parts(step, data, labels), group_sizes, lr))

            done = step + 1
            at_epoch_end, epoch = done % steps_per_epoch == 0, done // steps_per_epoch
            finished, stopping = done == last_step, stop.agreed(dist)
            evaluating = evaluate is not None and due(epoch, config.eval_freq)
            keep = at_epoch_end and config.save_intermediate_freq > 0 and epoch % config.save_intermediate_freq == 0
            saving = keep or finished or stopping
            saving |= at_epoch_end and (evaluating or due(epoch, config.save_last_freq))
            saving |= config.save_last_steps > 0 and done % config.save_last_steps == 0
            # Besides the agreement to stop, the only read-back from the device. Nothing is saved that isn't finite.
            if saving or at_epoch_end or done % config.log_freq == 0:
                monitor.report(lr)
            writer.check()
            if saving:
                save(done, keep)
            if finished or stopping:
                check_saved()
            if stopping and not finished:
                logger.info("stopped at step %d of %d; run the same command again to go on", done, total_steps)
                return stop.signal or signal.SIGTERM
            if at_epoch_end and (done < last_step or last_step == total_steps):
                after_epoch(epoch)
    logger.info("the training is finished: %d steps of %d are done", last_step, total_steps)
    return None
