"""How a classifier is trained: the whole data set in memory as bytes, augmented in batches on the device."""

from __future__ import annotations

import logging
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from engine.scoring.classifier import Classifier
from util.checkpoint import load_checkpoint
from util.config import check, setting
from util.errors import UserError, reading
from util.files import atomic_write
from util.signals import StopSignal, exit_status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassifierTrainConfig:
    """How a classifier is trained: AdamW, one learning-rate cycle, random shifts, rotations and scales."""

    epochs: int = setting(8, "passes over the images", at_least=1)
    batch_size: int = setting(64, "images per step", at_least=1)
    lr: float = setting(2e-3, "peak learning rate", above=0)
    weight_decay: float = setting(0.05, "on all parameters", at_least=0)
    label_smoothing: float = setting(0.1, "share of the target that is spread over all classes", at_least=0, below=1)
    shift: float = setting(0.06, "largest random shift, as a share of the side", at_least=0, below=1)
    rotate: float = setting(10.0, "largest random rotation, degrees", at_least=0, below=180)
    scale: float = setting(0.1, "largest random change of scale, relative", at_least=0, below=1)
    flip: bool = setting(False, "mirror half of the images: for photos, not for characters")
    seed: int = setting(0, "of weights, data order and augmentation")

    def __post_init__(self) -> None:
        check(self)


def augment(images: Tensor, config: ClassifierTrainConfig, generator: torch.Generator) -> Tensor:
    """Random affine maps of uint8 (B, 3, S, S), one per image; edges are repeated."""
    B, device = len(images), images.device

    def uniform(limit: float) -> Tensor:
        return (torch.rand(B, generator=generator, device=device) * 2 - 1) * limit

    angle, scale = uniform(math.radians(config.rotate)), 1 + uniform(config.scale)
    mirror = torch.where(uniform(1.0) < 0, -1.0, 1.0) if config.flip else torch.ones(B, device=device)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift_x, shift_y = uniform(2 * config.shift), uniform(2 * config.shift)  # the grid spans [-1, 1]
    rows = [torch.stack([cos * mirror, -sin, shift_x], 1), torch.stack([sin * mirror, cos, shift_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().to(torch.uint8)


class ClassifierTraining:
    """A training that resumes exactly where it was stopped, from a file that it writes after every epoch.

    Args:
        model: a new one; trained in place, bf16 on a GPU.
        images: uint8 (N, 3, S, S). ``labels``: int64 (N,).
        state: the file; it is there until it is removed by whoever has saved the trained model.
        described: plain data that tells this training from others.

    Raises:
        UserError: if the file is of another training, naming what differs.
    """

    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        config: ClassifierTrainConfig,
        device: torch.device,
        state: Path,
        described: dict[str, Any],
    ) -> None:
        self.config, self.device, self.state, self.described = config, device, state, described
        self.images, self.labels = images.to(device), labels.to(device)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.batch_size = min(config.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        # The cycle needs one step at least on each side of its peak.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.lr, max(self.total_steps, 10), pct_start=0.2
        )
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.at_epoch = self.generator.get_state()  # when the epoch began: the order of its images follows
        self.done = 0  # steps
        if state.exists():
            self._load()

    def _load(self) -> None:
        try:
            content = load_checkpoint(self.state)
        except UserError as error:
            logger.warning("%s The training starts from the beginning.", error)
            return
        with reading("state of a training", self.state):
            check_same(content["described"], self.described, self.state)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            self.done, self.at_epoch = operator.index(content["step"]), content["at_epoch"]
            self.generator.set_state(content["generator"])
            torch.set_rng_state(content["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(content["gpu_rng"], self.device)
        logger.info("resuming at step %d of %d", self.done, self.total_steps)

    def _save(self) -> None:
        content = {"described": self.described, "step": self.done, "at_epoch": self.at_epoch}
        content |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        content |= {"schedule": self.schedule.state_dict(), "generator": self.generator.get_state()}
        content["rng"] = torch.get_rng_state()  # dropout draws from it
        if self.device.type == "cuda":
            content["gpu_rng"] = torch.cuda.get_rng_state(self.device)
        with atomic_write(self.state) as file:
            torch.save(content, file)

    def run(self) -> None:
        """The steps that are left; leaves the model in eval mode.

        Raises:
            FloatingPointError: when losses are no longer finite; nothing of it is saved.
            SystemExit: when a stop signal came and the state is saved, with status 75; 130 for Ctrl-C.
        """
        self.model.train()
        total = self.total_steps
        with (
            tqdm(total=total, initial=self.done, desc="training the classifier", unit="step", mininterval=0.5) as bar,
            StopSignal() as stop,
        ):
            while self.done < total:
                self._epoch(stop, bar)
                self._save()
                if stop.signal is not None and self.done < total:
                    logger.info("stopped at step %d of %d; run the same command again to resume", self.done, total)
                    raise SystemExit(exit_status(stop.signal))
        self.model.eval()

    def _epoch(self, stop: StopSignal, bar: tqdm) -> None:
        """What is left of an epoch, or until a stop signal comes."""
        epoch, begun = divmod(self.done, self.steps_per_epoch)
        now = self.generator.get_state()
        self.generator.set_state(self.at_epoch)
        order = torch.randperm(len(self.images), generator=self.generator, device=self.device)
        if begun:
            self.generator.set_state(now)
        losses = []
        for step in range(begun, self.steps_per_epoch):
            losses.append(self._step(order[step * self.batch_size :][: self.batch_size]))
            self.done += 1
            bar.update()
            if stop.signal is not None:
                break
        if not torch.stack(losses).isfinite().all():
            raise FloatingPointError(
                f"the loss is not finite in epoch {epoch + 1}: the classifier's training diverged; give a lower --lr."
            )
        if self.done % self.steps_per_epoch == 0:
            self.at_epoch = self.generator.get_state()

    def _step(self, rows: Tensor) -> Tensor:
        """One optimizer step; returns the loss, on the device."""
        batch = augment(self.images[rows], self.config, self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(batch)
        loss = F.cross_entropy(logits.float(), self.labels[rows], label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def check_same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """UserError, naming what differs, if a file is of another training; a record of an earlier version may lack it."""
    for name, value in now.items():
        if before.get(name, value) != value:
            raise UserError(
                f"{path} is of a classifier trained with {name} {before[name]}, not {value}; give another --output, or "
                "delete it."
            )
