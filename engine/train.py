"""The training loop: one process or many, resumable at any step.

Everything random about a step is a function of (seed, step, sample's row in the global batch), so a run resumed at step
k goes on exactly as if it had never stopped, and the number of processes changes nothing but the dropout masks.

Shape legend: `B` samples of this process, `L` tokens of an image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.cache import exact_precision
from models.lpd import LPD
from tokenizers import VQModel
from util.checkpoint import LAST, save_checkpoint
from util.counter_rng import fold_in, random_bits
from util.data import CodeDataset, GlobalBatchSampler, ImageFolder, whole_batch
from util.dist import Dist
from util.errors import UserError
from util.files import write_json
from util.images import to_float
from util.logger import MetricsWriter
from util.lr_sched import LR_SCHEDULES, learning_rate
from util.optim import build_adamw, load_optimizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the published recipe of LPD-L at 256 px.

    `lr` None means blr · global batch / 256. `batch_size` counts samples per process. Frequencies are in epochs (0 =
    never) except `log_freq`, in steps.
    """

    output_dir: Path
    epochs: int = 450
    batch_size: int = 64
    lr: float | None = None
    blr: float = 1e-4
    min_lr: float = 1e-5
    lr_schedule: str = "constant+cosine"
    warmup_epochs: float = 50
    lr_decay_start_epoch: float = 400
    weight_decay: float = 0.02
    grad_clip: float = 3.0
    flip_prob: float = 0.5
    bf16: bool = False
    seed: int = 0
    num_workers: int = 8
    log_freq: int = 50
    save_last_freq: int = 1
    save_intermediate_freq: int = 0
    eval_freq: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_freq", "save_last_freq"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("save_intermediate_freq", "eval_freq", "num_workers", "seed"):
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

    def peak_lr(self, world_size: int) -> float:
        """Highest learning rate; UserError if a schedule that decays would rise from it to `min_lr`."""
        peak = self.lr if self.lr is not None else self.blr * self.batch_size * world_size / 256
        if self.lr_schedule != "constant" and peak < self.min_lr:
            raise UserError(f"--min_lr {self.min_lr} is above the peak learning rate, {peak:.3g}; lower it.")
        return peak


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_CHECK_STEPS = 10  # steps after which several processes agree on whether one of them was told to stop


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask the loop to finish its step and save; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)
        self.signal = number

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let signals act as usual, while something runs that can be interrupted at any time."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def _ignore_stop_signals(worker: int) -> None:
    """A launcher signals its whole process group; loading must go on until the step is finished."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def draw_samples(
    seed: int,
    step: int,
    rows: range,
    num_tokens: int,
    flip_prob: float,
    label_drop_prob: float,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is random about some `rows` of the global batch of a step; other rows don't matter.

    Returns:
        orders (B, L) int64, uniformly random permutations; flip (B,) bool, mirrored or not; label_drop (B,) bool.
    """
    key = fold_in(torch.tensor(seed, device=device), step)
    keys = fold_in(key, torch.arange(rows.start, rows.stop, device=device))
    bits = random_bits(keys, num_tokens + 2)
    orders = bits[:, :num_tokens].argsort(dim=1, stable=True)
    uniform = (bits[:, num_tokens:] >> 7).float() * 2.0**-24
    return orders, uniform[:, 0] < flip_prob, uniform[:, 1] < label_drop_prob


def load_batches(
    dataset: CodeDataset | ImageFolder, sampler: GlobalBatchSampler, num_workers: int, device: torch.device
) -> Iterator[list[torch.Tensor]]:
    """Batches on the device: codes (B, L), mirrored codes (B, L), labels (B,); or images (B, H, W, 3), labels (B,)."""
    cached = isinstance(dataset, CodeDataset)
    collate: Any = whole_batch if cached else None
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=0 if cached else num_workers,  # a batch of codes is read faster than handed over
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_stop_signals,
    )
    for batch in loader:
        yield [tensor.to(device, non_blocking=True) for tensor in batch]


def mirrored_codes(data: list[torch.Tensor], flip: torch.Tensor, tokenizer: VQModel | None) -> torch.Tensor:
    """Codes (B, L) of the pictures, mirrored where `flip` (B,) says so: looked up, or encoded by the tokenizer."""
    if tokenizer is None:
        codes, codes_flip = data
        return torch.where(flip[:, None], codes_flip, codes)
    images = to_float(data[0])
    with torch.no_grad(), exact_precision():
        return tokenizer.encode(torch.where(flip[:, None, None, None], images.flip(-1), images))


def train(
    model: LPD,
    dataset: CodeDataset | ImageFolder,
    schedules: Sequence[Sequence[int]],
    config: TrainConfig,
    dist: Dist,
    *,
    tokenizer: VQModel | None = None,
    resume: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    evaluate: Callable[[LPD, int], None] | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> int | None:
    """Train `model` on uniformly random orders, one schedule of group sizes drawn per step (paper, section 3.2).

    Writes `checkpoint-last.pth`, `checkpoint-<epoch>.pth` and `metrics.jsonl` into the output folder (rank 0).

    Args:
        schedules: group sizes to draw from, each summing to L.
        tokenizer: encodes images; not needed for cached codes.
        resume: a checkpoint of an earlier run of this one; its `model` is loaded already.
        metadata: plain data stored in every checkpoint (settings, class names, tokenizer hash).
        evaluate: called as (model, epoch) every `eval_freq` epochs and after the last, on all processes; once more when
            a run is resumed just there, since it may have been killed in the middle.
        log: called with every line of `metrics.jsonl`, on rank 0.

    Returns:
        None when finished, or the number of the signal that stopped the run after saving.

    Raises:
        UserError: for a data set smaller than one global batch, or a checkpoint that does not fit.
        FloatingPointError: when the loss is no longer finite; the last good checkpoint is kept.
    """
    device, L = dist.device, model.config.num_tokens
    global_batch = config.batch_size * dist.world_size

    def sampler(start: int, num_steps: int) -> GlobalBatchSampler:
        return GlobalBatchSampler(len(dataset), global_batch, dist.rank, dist.world_size, config.seed, start, num_steps)

    optimizer = build_adamw(model, config.weight_decay)
    start_step = 0
    # What the number of a step means; a checkpoint counts its steps in these.
    counted_in = {"global_batch": global_batch, "num_samples": len(dataset), "seed": config.seed}
    if resume is not None:
        for name, value in counted_in.items():
            if resume[name] != value:
                raise UserError(
                    f"the checkpoint is of a run with {name} {resume[name]}, this one has {value}; go on with the "
                    "same, or start anew from its weights with --pretrained_ckpt."
                )
        load_optimizer(optimizer, resume["optimizer"])
        start_step = resume["step"]
    steps_per_epoch = sampler(0, 0).steps_per_epoch
    total_steps = config.epochs * steps_per_epoch
    rows = range(dist.rank * config.batch_size, (dist.rank + 1) * config.batch_size)
    peak_lr = config.peak_lr(dist.world_size)
    logger.info(
        "%d samples, %d steps per epoch, global batch %d, peak learning rate %.3g, steps %d to %d",
        len(dataset), steps_per_epoch, global_batch, peak_lr, start_step, total_steps,
    )  # fmt: skip
    encoder = None if isinstance(dataset, CodeDataset) else tokenizer
    net: torch.nn.Module = model
    if dist.world_size > 1:
        net = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def save(name: str, step: int) -> None:
        if dist.is_main:
            payload = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            payload |= {"epoch": step // steps_per_epoch, "config": dataclasses.asdict(model.config)}
            save_checkpoint(config.output_dir / name, payload | counted_in | (metadata or {}))

    def due(epoch: int, frequency: int) -> bool:
        return epoch == config.epochs or (frequency > 0 and epoch % frequency == 0)

    if evaluate is not None and start_step and start_step % steps_per_epoch == 0:
        epoch = start_step // steps_per_epoch
        if due(epoch, config.eval_freq):
            evaluate(model, epoch)
    if start_step >= total_steps:
        logger.info("the training is finished: all %d epochs are done", config.epochs)
        return None

    metrics_path = config.output_dir / "metrics.jsonl" if dist.is_main else None
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    norm = torch.zeros((), device=device)
    logged_step, clock = start_step, time.perf_counter()
    model.train()
    with (
        StopRequest() as stop,
        MetricsWriter(metrics_path, start_step) as metrics,
        tqdm(initial=start_step, total=total_steps, desc="train", unit="step", disable=not dist.is_main) as bar,
    ):
        remaining = sampler(start_step, total_steps - start_step)
        batches = load_batches(dataset, remaining, config.num_workers, device)
        for step, (*data, labels) in enumerate(batches, start=start_step):
            lr = learning_rate(
                step / steps_per_epoch,
                schedule=config.lr_schedule,
                lr=peak_lr,
                min_lr=config.min_lr,
                warmup_epochs=config.warmup_epochs,
                epochs=config.epochs,
                lr_decay_start_epoch=config.lr_decay_start_epoch,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            draws = np.random.default_rng([config.seed, step])
            group_sizes = schedules[int(draws.integers(len(schedules)))]
            torch.manual_seed(int(draws.integers(2**62)) + dist.rank)  # dropout
            orders, flip, label_drop = draw_samples(
                config.seed, step, rows, L, config.flip_prob, model.config.label_drop_prob, device
            )
            tokens = mirrored_codes(data, flip, encoder)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                logits = net(tokens, labels, orders, group_sizes, label_drop)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(wide.flatten(0, 1), tokens.gather(1, orders).flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach()

            done = step + 1
            bar.update()
            at_epoch_end = done % steps_per_epoch == 0
            stopping = stop.signal is not None
            if dist.world_size > 1 and (done % STOP_CHECK_STEPS == 0 or at_epoch_end):
                stopping = dist.sum_(torch.tensor(float(stopping), device=device)).item() > 0
            elif dist.world_size > 1:
                stopping = False
            if done % config.log_freq == 0 or at_epoch_end or stopping:
                # Besides the agreement to stop, the only read-back from the device.
                mean_loss = dist.sum_(loss_sum).item() / (dist.world_size * (done - logged_step))
                grad_norm = norm.item()
                if not math.isfinite(mean_loss + grad_norm):
                    samples = list(sampler(logged_step, done - logged_step))
                    report = {"first_step": logged_step, "samples_of_each_step": samples}
                    write_json(config.output_dir / f"nonfinite-rank{dist.rank}.json", report)
                    raise FloatingPointError(
                        f"the loss is {mean_loss}, the norm of the gradient {grad_norm} between steps {logged_step} "
                        f"and {done}; nothing was saved since, nonfinite-rank{dist.rank}.json in {config.output_dir} "
                        "names the samples."
                    )
                seconds = time.perf_counter() - clock
                images_per_sec = (done - logged_step) * global_batch / seconds
                bar.set_postfix(loss=f"{mean_loss:.4f}", img_s=f"{images_per_sec:.0f}")
                values = {"step": done, "epoch": round(done / steps_per_epoch, 4), "loss": mean_loss, "lr": lr}
                values |= {"grad_norm": grad_norm, "images_per_sec": round(images_per_sec, 2)}
                metrics.write(**values)
                if log is not None and dist.is_main:
                    log(values)
                loss_sum.zero_()
                logged_step, clock = done, time.perf_counter()
            if at_epoch_end or stopping:
                epoch = done // steps_per_epoch
                keep = at_epoch_end and config.save_intermediate_freq and epoch % config.save_intermediate_freq == 0
                evaluating = at_epoch_end and evaluate is not None and due(epoch, config.eval_freq)
                if keep:
                    save(f"checkpoint-{epoch}.pth", done)
                if keep or stopping or evaluating or due(epoch, config.save_last_freq):
                    save(LAST, done)
                if stopping:
                    logger.warning("stopped at step %d of %d; run the same command again to go on", done, total_steps)
                    return stop.signal or signal.SIGTERM
                if evaluating and evaluate is not None:
                    with stop.suspended():
                        evaluate(model, epoch)
                clock = time.perf_counter()
    return None
