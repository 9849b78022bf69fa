"""The training loop: one process or many, resumable at any step.

Everything random about a step is a function of (seed, step, sample's row in the global batch), so a run resumed at step
k is the same as one that never stopped, and the numbers of processes and of parts of a step change nothing but the
dropout masks.

Shape legend: `B` samples of this process, `L` tokens of an image.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.training.batch import OrderMixture, Part, codes_of, draw_samples
from engine.training.checkpoint_writer import CheckpointWriter
from engine.training.config import TrainConfig
from engine.training.monitor import Monitor
from engine.training.resume import check_continues
from engine.training.step import TrainStep
from engine.training.stop import StopRequest
from engine.training.trackers import Tracker
from engine.training.validation import what_limits
from models.flops import training_flops
from models.lpd import LPD
from orders.config import parse_shares
from tokenizers import VQModel
from util.data.codes import CodeDataset
from util.data.images import ImageDataset
from util.data.loading import load_batches
from util.data.sampler import GlobalBatchSampler
from util.dist import Dist
from util.errors import UserError
from util.lr_sched import learning_rate
from util.readers import read_json_lines

logger = logging.getLogger(__name__)


class Trainer:
    """One run, from its first step or a checkpoint to its end.

    A schedule of group sizes is drawn per step; orders are uniformly random (paper, section 3.2), or what
    `config.train_orders` says. Rank 0 writes `checkpoint-last.pth` (and what it was before,
    `checkpoint-last-1.pth` …), `checkpoint-<epoch>.pth`, `metrics.jsonl` and `samples/` into the output folder.

    Args:
        model: on `dist.device`.
        schedules: group sizes to draw from, each summing to L.
        tokenizer: encodes images; not needed for cached codes.
        resume: a checkpoint of an earlier run of this one; its `model` is loaded already. It is emptied once it is
            loaded, so that it does not stay in memory.
        resume_from: what messages call it.
        metadata: plain data stored in every checkpoint (flags, class names, tokenizer hash).
        evaluate: called as (model, epoch) every `eval_freq` epochs and after the last, on all processes; once more when
            a run is resumed just there, since it may have been killed in the middle.
        validate: called as (model) at the end of every `val_freq` epochs and of the last, on all processes; the loss
            that it returns is `val_loss` of the epoch's line in `metrics.jsonl`, that of the moving average (where
            there is one) `val_loss_ema`.
        draw_grid: called as (model) every `sample_freq` epochs, on all processes; rank 0 returns the picture to keep.
        trackers: get what `metrics.jsonl` and the folder `samples` get, on rank 0.

    Raises:
        UserError: for a data set smaller than one global batch, or a checkpoint that does not fit or has trained for
            longer.
    """

    def __init__(
        self,
        model: LPD,
        dataset: CodeDataset | ImageDataset,
        schedules: Sequence[Sequence[int]],
        config: TrainConfig,
        dist: Dist,
        *,
        tokenizer: VQModel | None = None,
        resume: dict[str, Any] | None = None,
        resume_from: str = "the checkpoint",
        metadata: dict[str, Any] | None = None,
        evaluate: Callable[[LPD, int], None] | None = None,
        validate: Callable[[LPD], float] | None = None,
        draw_grid: Callable[[LPD], Image.Image | None] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.model, self.dataset, self.schedules, self.config, self.dist = model, dataset, schedules, config, dist
        self.metadata, self.evaluate, self.draw_grid, self.trackers = metadata or {}, evaluate, draw_grid, trackers
        self.validate = validate
        self.encoder = None if isinstance(dataset, CodeDataset) else tokenizer
        self.global_batch = config.global_batch(dist.world_size)
        # What the number of a step means; a checkpoint counts its steps in these.
        self.counted_in = {"global_batch": self.global_batch, "num_samples": len(dataset), "seed": config.seed}
        self.steps_per_epoch = self._sampler(0, 0).steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.peak_lr = config.peak_lr(dist.world_size)
        self.min_lr = min(config.min_lr, self.peak_lr)
        shares = parse_shares(config.train_orders)
        self.orders = OrderMixture(shares, model.config.grid_size, schedules, config.seed)
        self.train_step = TrainStep(model, config, dist)
        self.start_step = 0 if resume is None else self._load(resume, resume_from)

    def _sampler(self, start: int, num_steps: int) -> GlobalBatchSampler:
        size, dist = len(self.dataset), self.dist
        return GlobalBatchSampler(
            size, self.global_batch, dist.rank, dist.world_size, self.config.seed, start, num_steps
        )

    def _load(self, checkpoint: dict[str, Any], source: str) -> int:
        """Load the state of an earlier run of this one and empty `checkpoint`; the step to resume from."""
        check_continues(checkpoint, source, self.counted_in, self.config.epochs)
        start_step = int(checkpoint["step"])
        self._warn_of_other_orders(checkpoint.get("args") or {})
        self._warn_of_another_learning_rate(checkpoint.get("args") or {})
        self.train_step.load(checkpoint)
        checkpoint.clear()
        return start_step

    def _warn_of_another_learning_rate(self, earlier: dict[str, Any]) -> None:
        """Defaults may be other ones than when the run was started: then the same command is not the same run."""
        names = ("lr", "blr", "warmup_epochs", "lr_decay_start_epoch")
        if not all(name in earlier for name in names):
            return
        changed = [name for name in names[2:] if earlier[name] != getattr(self.config, name)]
        before = dataclasses.replace(self.config, lr=earlier["lr"], blr=earlier["blr"])
        if before.peak_lr(self.dist.world_size) != self.config.peak_lr(self.dist.world_size):
            changed.append("blr" if earlier["lr"] is None else "lr")
        if changed:
            kept = " ".join(f"--{name} {earlier[name]}" for name in changed)
            logger.warning("until now this run had another learning rate; to keep it, give: %s", kept)

    def _warn_of_other_orders(self, earlier: dict[str, Any]) -> None:
        before = tuple(earlier.get("train_orders", self.config.train_orders))
        if before != self.config.train_orders:
            logger.warning(
                "until now this run had other orders; to keep them, give: --train_orders %s", " ".join(before)
            )

    def run(self) -> int | None:
        """Train to the end.

        Returns:
            None when finished, or the number of the signal that stopped the run after saving.

        Raises:
            UserError: for a last state that can't be written.
            FloatingPointError: when the loss is no longer finite; the last good checkpoint is kept.
        """
        self._log_start()
        self.model.train()
        folder, keep_last = self.config.output_dir, self.config.keep_last
        with (
            StopRequest() as self.stop,
            CheckpointWriter(folder if self.dist.is_main else None, keep_last, self.start_step) as self.writer,
            self._monitor() as self.monitor,
        ):
            if self.start_step and self.start_step % self.steps_per_epoch == 0:
                self._after_epoch(self.start_step)  # once more: it may have been killed in the middle
            for step, (*data, labels) in enumerate(self.monitor.waiting(self._batches()), start=self.start_step):
                lr = self._learning_rate(step)
                self._step(step, data, labels, lr)
                if self._after_step(step + 1, lr):
                    return self.stop.signal or signal.SIGTERM
        logger.info("the training is finished: %d steps of %d are done", self.last_step, self.total_steps)
        if self.dist.is_main and self.last_step == self.total_steps:
            lines = read_json_lines(folder / "metrics.jsonl", "epoch")
            if (limit := what_limits(lines)) is not None:
                logger.warning("%s", limit)
        return None

    def _log_start(self) -> None:
        if self.config.lr_schedule != "constant" and self.min_lr < self.config.min_lr and self.dist.is_main:
            logger.warning(
                "the peak learning rate, %.3g, is below --min_lr %g; it will stay at the peak instead of falling",
                self.peak_lr, self.config.min_lr,
            )  # fmt: skip
        logger.info(
            "%d samples, %d steps per epoch, global batch %d, peak learning rate %.3g, steps %d to %d",
            len(self.dataset), self.steps_per_epoch, self.global_batch, self.peak_lr, self.start_step, self.last_step,
        )  # fmt: skip

    def _monitor(self) -> Monitor:
        return Monitor(
            self.config.output_dir,
            self.dist,
            start_step=self.start_step,
            total_steps=self.last_step,
            steps_per_epoch=self.steps_per_epoch,
            global_batch=self.global_batch,
            flops_per_image=training_flops(self.model.config),
            samples_of=lambda step: next(iter(self._sampler(step, 1))),
            trackers=self.trackers,
        )

    def _batches(self) -> Iterator[list[torch.Tensor]]:
        sampler = self._sampler(self.start_step, max(0, self.last_step - self.start_step))
        return load_batches(self.dataset, sampler, self.config.num_workers, self.dist.device)

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step / self.steps_per_epoch,
            schedule=config.lr_schedule,
            lr=self.peak_lr,
            min_lr=self.min_lr,
            warmup_epochs=config.warmup_epochs,
            epochs=config.epochs,
            lr_decay_start_epoch=config.lr_decay_start_epoch,
        )

    def _step(self, step: int, data: list[torch.Tensor], labels: torch.Tensor, lr: float) -> None:
        draws = np.random.default_rng([self.config.seed, step])
        group_sizes = self.schedules[int(draws.integers(len(self.schedules)))]
        torch.manual_seed(int(draws.integers(2**62)) + self.dist.rank)  # dropout
        self.monitor.add(*self.train_step(self._parts(step, data, labels, group_sizes), group_sizes, lr))

    def _parts(
        self, step: int, data: list[torch.Tensor], labels: torch.Tensor, group_sizes: Sequence[int]
    ) -> Iterator[Part]:
        """This process's samples of a step, a contiguous share of the global batch, in parts."""
        config, model = self.config, self.model.config
        first = self.dist.rank * len(labels)
        for start in range(0, len(labels), config.batch_size):
            part = slice(start, start + config.batch_size)
            rows = range(first + part.start, first + part.stop)
            orders, flip, label_drop = draw_samples(
                config.seed, step, rows, model.num_tokens, config.flip_prob, model.label_drop_prob, self.dist.device
            )
            codes = codes_of([tensor[part] for tensor in data], flip, self.encoder)
            yield codes, labels[part], self.orders.mix(orders, step, rows, group_sizes), label_drop

    def _after_step(self, done: int, lr: float) -> bool:
        """Report, save and evaluate what is due after `done` steps; whether a signal ends the run here."""
        finished, stopping = done == self.last_step, self.stop.agreed(self.dist)
        saving = finished or stopping or self._save_is_due(done)
        # Besides the agreement to stop, the only read-back from the device. Nothing is saved that isn't finite.
        if saving or done % self.steps_per_epoch == 0 or done % self.config.log_freq == 0:
            self.monitor.report(lr, self._validate if self._validation_is_due(done) else None)
        if saving:
            self._save(done)
        if finished or stopping:
            self._check_saved()
        if stopping and not finished:
            logger.info("stopped at step %d of %d; run the same command again to resume", done, self.total_steps)
            return True
        if done % self.steps_per_epoch == 0:
            self._after_epoch(done)
        return False

    def _is_due(self, epoch: int, frequency: int) -> bool:
        return epoch == self.config.epochs or (frequency > 0 and epoch % frequency == 0)

    def _keep_is_due(self, done: int) -> bool:
        """Whether the state after `done` steps is kept for good."""
        epoch, rest = divmod(done, self.steps_per_epoch)
        return rest == 0 and self.config.save_intermediate_freq > 0 and epoch % self.config.save_intermediate_freq == 0

    def _save_is_due(self, done: int) -> bool:
        epoch, rest = divmod(done, self.steps_per_epoch)
        if self.config.save_last_steps > 0 and done % self.config.save_last_steps == 0:
            return True
        evaluating = self.evaluate is not None and self._is_due(epoch, self.config.eval_freq)
        return rest == 0 and (evaluating or self._is_due(epoch, self.config.save_last_freq) or self._keep_is_due(done))

    def _validation_is_due(self, done: int) -> bool:
        epoch, rest = divmod(done, self.steps_per_epoch)
        return self.validate is not None and rest == 0 and self._is_due(epoch, self.config.val_freq)

    def _validate(self) -> dict[str, float]:
        assert self.validate is not None
        values = {"val_loss": self.validate(self.train_step.evaluation_model(average=False))}
        if self.train_step.ema is not None:
            values["val_loss_ema"] = self.validate(self.train_step.evaluation_model())
        return values

    def _save(self, done: int) -> None:
        state = self.train_step.state()  # by all processes
        epoch = done // self.steps_per_epoch
        state |= {"step": done, "epoch": epoch, "config": dataclasses.asdict(self.model.config)}
        self.writer.save(state | self.counted_in | self.metadata, epoch if self._keep_is_due(done) else None)

    def _check_saved(self) -> None:
        if failure := self.dist.broadcast(self.writer.wait()):
            raise UserError(
                f"the run ends without its last state: {failure}; make room and run the same command again, it resumes "
                "from the checkpoint before."
            )

    def _after_epoch(self, done: int) -> None:
        """Pictures and evaluation, after saving; none where --max_steps ends the run early."""
        if done >= self.last_step and self.last_step < self.total_steps:
            return
        epoch = done // self.steps_per_epoch
        with self.monitor.paused():
            if self.draw_grid is not None and self.config.sample_freq and self._is_due(epoch, self.config.sample_freq):
                picture = self.draw_grid(self.train_step.evaluation_model())
                if picture is not None:
                    self.monitor.picture("samples", picture, epoch)
            if self.evaluate is not None and self._is_due(epoch, self.config.eval_freq):
                self.writer.wait()
                # A signal may have come after the processes agreed about the last step.
                told = next(filter(None, self.dist.gather(self.stop.signal)), None)
                if told is not None:
                    self._check_saved()
                with self.stop.suspended(told):
                    self.evaluate(self.train_step.evaluation_model(), epoch)
