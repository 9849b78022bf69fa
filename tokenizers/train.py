"""Train a small tokenizer on images: ``python -m tokenizers.train --data_path FOLDER --output_dir DIR ...``.

Reconstruction (L1 + L2), codebook and commitment losses with the straight-through estimator (van den Oord et al.,
arXiv:1711.00937) on normalised vectors (Yu et al., arXiv:2110.04627). The network first runs a little without
quantisation; then the codebook starts from k-means over encoder outputs, and dead entries are revived, so that it does
not collapse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokenizers.checkpoint import save_tokenizer
from tokenizers.codebook_training import DeadCodeRevival, codebook_use, kmeans_start
from tokenizers.training_data import flip_half, read_batches, split
from tokenizers.vq_model import MULTIPLIERS, VQConfig, VQModel
from util.checkpoint import load_checkpoint
from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, part, record, setting
from util.data.images import open_images
from util.data.loading import Images, load_all
from util.dist import DeviceConfig, resolve_device
from util.errors import UserError
from util.files import atomic_write, check_output_dir, write_json
from util.folder_lock import FolderLock
from util.logger import MetricsWriter, setup_logging
from util.lr_sched import learning_rate
from util.pictures import image_grid, save_png, to_float, to_uint8
from util.signals import StopSignal, exit_status

log = logging.getLogger(__name__)

_COMMITMENT = 0.25  # weight of the commitment loss, as in both papers
_WARMUP = 0.05  # share of the steps in which the learning rate rises
_PLAIN = 0.05  # share of the steps without quantisation
_REVIVE_UNTIL = 0.7  # after this share of the steps entries are no longer moved and the decoder settles
_PICTURES = 12
TOKENIZER, METRICS, STATE = "tokenizer.pt", "metrics.json", "state.pth"  # the last one of an unfinished training


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How to train. The learning rate rises to ``lr``, then falls to 0. UserError for a setting out of its range."""

    steps: int = setting(help="optimizer steps", at_least=1)
    batch_size: int = setting(64, "images per step", at_least=1)
    lr: float = setting(1e-3, "highest learning rate", above=0)
    eval_freq: int = setting(500, "measure and save every N steps", at_least=1)
    held_out: float = setting(0.1, "share of the images kept for measuring", above=0, below=1)
    flip: bool = setting(False, "mirror half of the training images at random")
    bf16: bool = setting(False, "bfloat16 autocast (for GPUs)")
    num_workers: int = setting(0, "image readers", at_least=0)
    seed: int = setting(0, "of the split, the weights and the batches", at_least=0, below=2**32)

    def __post_init__(self) -> None:
        check(self)


def train_tokenizer(
    dataset: Images,
    model_config: VQConfig,
    config: TokenizerTrainConfig,
    output_dir: Path,
    device: torch.device,
    test_set: Images | None = None,
) -> dict[str, Any]:
    """Train on part of ``dataset`` and measure on the rest; with a ``test_set`` train on all and measure on that.

    Writes into ``output_dir``, every ``eval_freq`` steps and at the end: ``tokenizer.pt``, ``metrics.json``,
    ``reconstructions.png`` (held-out images above their reconstructions) and a line of ``metrics.jsonl``. Until it is
    finished ``state.pth`` lies beside them, from which the same call resumes, exactly as if it had not been
    interrupted. A finished training is left as it is. A stop signal saves it after the step.

    Returns:
        What ``metrics.json`` holds: on the held-out images ``psnr_db``, ``codebook_share`` (of entries chosen at all)
        and ``codebook_perplexity``; counts, ``train_sec`` and the configurations.

    Raises:
        UserError: when the images are fewer than two, the folder holds a tokenizer trained otherwise, or
            another process writes to it.
        FloatingPointError: when the training diverges; what was saved before is kept.
        SystemExit: when a stop signal came and the state is saved, with status 75; 130 for Ctrl-C.
    """
    if test_set is None:
        train_set, held_out_set = split(dataset, config.held_out, config.seed)
    else:
        train_set, held_out_set = dataset, test_set
    described = {"tokenizer": record(model_config), "training": record(config), "train_images": len(train_set)}
    with FolderLock(output_dir) as lock:
        lock.acquire()
        state, metrics = _read_earlier(output_dir, described)
        if metrics is not None and metrics["step"] == config.steps and (output_dir / TOKENIZER).exists():
            log.info("the training is finished: all %d steps are done", config.steps)
            return metrics
        torch.manual_seed(config.seed)
        held_out = load_all(held_out_set, max(1, config.num_workers))[0].to(device)
        training = _Training(model_config, config, output_dir, described, held_out)
        if state is not None:
            training.load(state)
            log.info("resuming at step %d of %d", training.done, config.steps)
        return training.run(train_set)


def _read_earlier(folder: Path, described: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """State and last figures of an earlier run of this training, None where there are none.

    Raises:
        UserError: for those of another training: code caches and models depend on a tokenizer.
    """
    state, metrics = None, None
    if (folder / METRICS).exists():
        metrics = json.loads((folder / METRICS).read_text())
    if (folder / STATE).exists():
        try:
            state = load_checkpoint(folder / STATE)
        except UserError as error:
            log.warning("training starts from the beginning: %s", error)
    for found in filter(None, (state, metrics)):
        before = _flat(found)
        for name, value in _flat(described).items():
            # A record of an earlier version may lack a name.
            if name not in ("num_workers", "eval_freq") and before.get(name, value) != value:
                raise UserError(
                    f"{folder} holds a tokenizer trained with {name} {before[name]}, not {value}; give another "
                    "--output_dir, or delete this one."
                )
    return state, metrics


def _flat(described: dict[str, Any]) -> dict[str, Any]:
    names = ("tokenizer", "training", "train_images")
    described = json.loads(json.dumps({name: described[name] for name in names}))  # tuples compare as lists
    count = described["train_images"]
    return {**described["tokenizer"], **described["training"], "number of training images": count}


class _Training:
    """A tokenizer, what a step does to it, and what it leaves in its folder.

    What is random about a step follows from its number, so that a resumed training is an uninterrupted one.
    ``described`` tells this training from others; ``held_out``, uint8 (N, H, H, 3), is on the device.
    """

    def __init__(
        self,
        model_config: VQConfig,
        config: TokenizerTrainConfig,
        folder: Path,
        described: dict[str, Any],
        held_out: Tensor,
    ) -> None:
        self.config, self.folder, self.described, self.held_out = config, folder, described, held_out
        # On a CPU the default layout is the faster one for narrow networks.
        self.layout = torch.channels_last if held_out.is_cuda else torch.contiguous_format
        self.model = VQModel(model_config).to(held_out.device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )
        self.revival = DeadCodeRevival(self.model.quantize)
        self.done = 0  # steps
        self._start = time.perf_counter()
        self.plain_steps = int(_PLAIN * config.steps)
        tokens_per_step = config.batch_size * (held_out.shape[1] // self.model.stride) ** 2
        # Between two revivals an entry of average use is chosen at least eight times.
        self.revive_every = max(20, math.ceil(8 * model_config.codebook_size / tokens_per_step))
        # The codebook starts from the images of the last plain steps.
        self._recent: deque[Tensor] = deque(maxlen=max(4, self.revive_every // 5))

    def load(self, state: dict[str, Any]) -> None:
        self.done = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.revival.counts.copy_(state["counts"])
        self._start -= state["elapsed_sec"]

    def save(self) -> None:
        state = {
            "step": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.revival.counts,
            "elapsed_sec": self.seconds(),
        }
        with atomic_write(self.folder / STATE) as file:
            torch.save(state | self.described, file)

    def seconds(self) -> float:
        """Time spent in training, that of interrupted runs included."""
        return round(time.perf_counter() - self._start, 2)

    def run(self, train_set: Images) -> dict[str, Any]:
        """The steps that are left, measured and saved on the way; returns the last figures."""
        config, metrics = self.config, self.described
        # Where the codebook has not started yet, the batches it starts from are read again.
        again = self._recent.maxlen or 0 if self.done <= self.plain_steps else 0
        steps = range(max(0, self.done - again), config.steps)
        batches = read_batches(
            train_set, steps, config.batch_size, config.seed, config.num_workers, self.held_out.device
        )
        with (
            StopSignal() as stop,
            contextlib.closing(MetricsWriter(self.folder / "metrics.jsonl", self.done)) as writer,
            tqdm(total=config.steps, initial=self.done, desc="tokenizer", unit="step") as bar,
        ):
            for step, batch in zip(steps, batches, strict=True):
                pixels = self._prepare(step, batch)
                if step < self.done:
                    continue
                losses = self._step(pixels)
                bar.update()
                finished = self.done == config.steps
                measuring = finished or self.done % config.eval_freq == 0
                told = None if finished else stop.signal
                if measuring or told is not None:
                    self._require_finite(*losses.values(), *self.model.parameters())
                if measuring:
                    metrics = self._measure(losses, writer)
                if told is not None or (measuring and not finished):
                    self.save()
                if told is not None:
                    log.info("stopped at step %d of %d; run the same command again to resume", self.done, config.steps)
                    raise SystemExit(exit_status(told))
        (self.folder / STATE).unlink(missing_ok=True)
        return metrics

    def _require_finite(self, *values: Tensor) -> None:
        """Called before anything is saved, and seldom, since it reads back from the device."""
        if not torch.stack([value.isfinite().all() for value in values]).all():
            raise FloatingPointError(
                f"losses, weights or reconstructions are no longer finite at step {self.done}: the training has "
                "diverged and nothing was saved since the last measurement; give a lower --lr and another --output_dir."
            )

    def _prepare(self, step: int, batch: Tensor) -> Tensor:
        """The images of a step as the network sees them, uint8 (B, H, H, 3); also seeds what the step draws."""
        torch.manual_seed((self.config.seed << 32) + step)
        pixels = flip_half(batch) if self.config.flip else batch
        if step <= self.plain_steps:
            self._recent.append(pixels)
        return pixels

    def _step(self, pixels: Tensor) -> dict[str, Tensor]:
        """One optimizer step; returns the loss terms."""
        config = self.config
        if self.done == self.plain_steps:
            self._start_codebook()
        images = to_float(pixels).contiguous(memory_format=self.layout)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.bf16):
            losses, features, indices = _losses(self.model, images, quantise=self.done >= self.plain_steps)
        # A step stands for its middle, so that neither the first nor the last one is wasted on a rate of zero.
        epoch, warmup = self.done + 0.5, _WARMUP * config.steps
        lr = learning_rate(epoch, schedule="cosine", lr=config.lr, min_lr=0, warmup_epochs=warmup, epochs=config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        self.done += 1
        if indices is not None:
            self.revival.count(indices)
            if self.done % self.revive_every == 0 and self.done - 1 < _REVIVE_UNTIL * config.steps:
                self._require_finite(*losses.values())  # features are drawn by their distances
                self.revival.revive(features, self.optimizer)
        return losses

    @torch.no_grad()
    def _start_codebook(self) -> None:
        features = [self.model.features(to_float(pixels)).flatten(0, 1) for pixels in self._recent]
        kmeans_start(self.model.quantize, torch.cat(features))
        self._recent.clear()

    @torch.no_grad()
    def _measure(self, losses: dict[str, Tensor], writer: MetricsWriter) -> dict[str, Any]:
        """Measure on the held-out images; write the figures, the tokenizer and a picture; returns the figures."""
        quality, seconds = evaluate(self.model, self.held_out, self.config.batch_size), self.seconds()
        self._require_finite(torch.tensor(list(quality.values())))
        values = {name: round(float(value.detach()), 6) for name, value in losses.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        writer.write(step=self.done, lr=lr, **values, **quality, elapsed_sec=seconds)
        metrics = {
            "step": self.done,
            **self.described,
            "held_out_images": len(self.held_out),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            **quality,
            "train_sec": seconds,
        }
        save_tokenizer(self.model, self.folder / TOKENIZER)
        write_json(self.folder / METRICS, metrics)
        originals = self.held_out[:_PICTURES]
        made = to_uint8(self.model.decode(self.model.encode(to_float(originals))))
        pictures = torch.cat([originals, made]).cpu()
        grid = image_grid(pictures, len(originals), row_titles=["original", "reconstruction"])
        save_png(grid, self.folder / "reconstructions.png")
        return metrics


def _losses(model: VQModel, images: Tensor, *, quantise: bool) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """The weighted loss terms, the detached unit vectors (N, K) before quantisation, and their indices if quantised."""
    features = model.features(images)
    losses: dict[str, Tensor] = {}
    indices = None
    decoder_input = features
    if quantise:
        indices = model.quantize.nearest(features)
        entries = model.quantize.lookup(indices)
        losses["codebook"] = (entries - features.detach()).square().mean()
        losses["commitment"] = _COMMITMENT * (entries.detach() - features).square().mean()
        decoder_input = features + (entries - features).detach()
    error = model.decode_features(decoder_input).float() - images
    losses["l1"] = error.abs().mean()
    losses["l2"] = error.square().mean()
    return losses, features.detach().flatten(0, 1), indices


@torch.no_grad()
def evaluate(model: VQModel, pixels: Tensor, batch_size: int) -> dict[str, float]:
    """PSNR (dB, mean over images) and codebook use over uint8 images (N, H, H, 3) on the model's device."""
    counts = torch.zeros(model.config.codebook_size, device=pixels.device)
    psnr = []
    for batch in pixels.split(batch_size):
        images = to_float(batch)
        indices = model.encode(images)
        mse = ((model.decode(indices).clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
        psnr.append(-10 * mse.clamp_min(1e-10).log10())
        counts += torch.bincount(indices.flatten(), minlength=len(counts))
    share, perplexity = codebook_use(counts)
    return {
        "psnr_db": round(float(torch.cat(psnr).mean()), 3),
        "codebook_share": round(share, 4),
        "codebook_perplexity": round(perplexity, 2),
    }


@dataclass(frozen=True)
class TokenizerCommand(DeviceConfig):
    """What ``python -m tokenizers.train`` does. UserError for settings out of range, or that do not go together."""

    data_path: Path = setting(help="images: one subfolder per class, or photos.npz:train")
    output_dir: Path = setting(help="folder for the results; made if missing")
    tokenizer: VQConfig = part("tokenizer")
    training: TokenizerTrainConfig = part("training")
    test_path: Path | None = setting(None, "images to measure on (default: a part of --data_path is held out)")
    img_size: int = setting(256, "side of the centre crop, pixels", at_least=1)
    stride: int = setting(16, "pixels per token and side: 1, 2, 4, 8 or 16")
    epochs: int | None = setting(None, "passes over the training images, instead of --steps", at_least=1)
    skip_broken: bool = setting(False, "leave out images that cannot be read")

    def __post_init__(self) -> None:
        check(self)
        stride, multipliers = self.stride, self.tokenizer.multipliers
        if self.tokenizer.stride != stride:
            levels = len(MULTIPLIERS[stride])
            raise UserError(f"--multipliers {multipliers} must be {levels} numbers for --stride {stride}.")
        if self.img_size % stride:
            raise UserError(f"--img_size {self.img_size} must be a multiple of --stride {stride}.")
        check_output_dir(self.output_dir)


def _parse() -> TokenizerCommand:
    parser = Parser(
        prog="python -m tokenizers.train",
        description="Train a small VQ tokenizer on images; writes tokenizer.pt, metrics.json, metrics.jsonl "
        "and reconstructions.png.",
    )
    small = {"base_width": 64, "multipliers": None, "codebook_size": 1024}
    parser.add_config(TokenizerCommand, {**small, "steps": None, "num_workers": min(8, os.cpu_count() or 1)})
    args = parser.parse_args()
    if args.stride not in MULTIPLIERS:
        raise UserError(f"--stride is {args.stride}; choose one of {', '.join(map(str, MULTIPLIERS))}.")
    if (args.steps is None) == (args.epochs is None):
        raise UserError("give either --steps or --epochs.")
    # The number of steps of so many epochs is known when the images have been counted.
    training = from_args(TokenizerTrainConfig, args, steps=1 if args.steps is None else args.steps)
    tokenizer = from_args(VQConfig, args, multipliers=args.multipliers or MULTIPLIERS[args.stride])
    return from_args(TokenizerCommand, args, tokenizer=tokenizer, training=training)


def main() -> None:
    command = _parse()
    setup_logging()
    device = resolve_device(command.device)
    config, size, skip = command.training, command.img_size, command.skip_broken
    dataset = open_images(command.data_path, size, skip)
    test_set = None if command.test_path is None else open_images(command.test_path, size, skip)
    if command.epochs is not None:
        train_set = split(dataset, config.held_out, config.seed)[0] if test_set is None else dataset
        steps = math.ceil(command.epochs * len(train_set) / config.batch_size)
        config = dataclasses.replace(config, steps=steps)
    log.info("%s, %s on %s", command.tokenizer, config, device)
    torch.backends.cudnn.benchmark = True  # one shape throughout
    metrics = train_tokenizer(dataset, command.tokenizer, config, command.output_dir, device, test_set)
    print(
        f"{command.output_dir / TOKENIZER}: PSNR {metrics['psnr_db']:.2f} dB on {metrics['held_out_images']} "
        f"held-out images, {metrics['codebook_share']:.1%} of {command.tokenizer.codebook_size} codes in use "
        f"(perplexity {metrics['codebook_perplexity']:.1f}), {metrics['train_sec']:.0f} s"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
