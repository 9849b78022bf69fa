"""Train a small tokenizer on images: ``python -m tokenizers.train --data_path FOLDER --output_dir DIR ...``.

Reconstruction (L1 + L2), codebook and commitment losses with the straight-through estimator (van den Oord et al.,
arXiv:1711.00937) on normalised vectors (Yu et al., arXiv:2110.04627). The network first runs a little without
quantisation; then the codebook starts from k-means over encoder outputs, and dead entries are revived, so that it does
not collapse.
"""

from __future__ import annotations

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
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from tokenizers.checkpoint import save_tokenizer
from tokenizers.codebook_training import DeadCodeRevival, codebook_use, kmeans_start
from tokenizers.training_data import everything, flip_half, held_out_count, read_batches, split
from tokenizers.vq_model import MULTIPLIERS, VQConfig, VQModel
from util.checkpoint import load_checkpoint
from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, part, record, setting
from util.data.images import open_images
from util.data.loading import Images, load_all
from util.dist import resolve_device
from util.errors import UserError
from util.files import atomic_write, check_output_dir, write_json
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
    """How to train. The learning rate rises to ``lr``, then falls to 0.

    Raises:
        UserError: for a setting out of its range.
    """

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
) -> dict[str, float]:
    """Train on part of ``dataset`` and measure on the rest; with a ``test_set`` train on all and measure on that.

    Writes into ``output_dir``, every ``eval_freq`` steps and at the end: ``tokenizer.pt``, ``metrics.json`` (the
    returned figures and the configurations), ``reconstructions.png`` (held-out images above their reconstructions) and
    a line of ``metrics.jsonl``. Until it is finished ``state.pth`` lies beside them, from which the same call resumes,
    exactly as if it had not been interrupted. A finished training is left as it is. A stop signal saves it after the
    step.

    Returns:
        On the held-out images: ``psnr_db``, ``codebook_share`` (of entries chosen at all) and ``codebook_perplexity``;
        then counts and ``train_sec``.

    Raises:
        UserError: when the images do not fit the tokenizer's stride or are fewer than two, or the folder holds a
            tokenizer trained otherwise.
        SystemExit: when a stop signal came and the state is saved, with status 75; 130 for Ctrl-C.
    """
    train_set, held_out_set = (
        split(dataset, config.held_out, config.seed)
        if test_set is None
        else (everything(dataset), everything(test_set))
    )
    side = len(dataset[0][0])
    if side % model_config.stride:
        raise UserError(f"images of {side} pixels do not fit a tokenizer of stride {model_config.stride}.")
    folder = _Folder(
        output_dir, {"tokenizer": record(model_config), "training": record(config), "train_images": len(train_set)}
    )
    state, earlier = folder.read()
    if earlier is not None and earlier["step"] == config.steps and (output_dir / TOKENIZER).exists():
        log.info("the training is finished: all %d steps are done", config.steps)
        return {name: value for name, value in earlier.items() if name not in ("step", *folder.record)}

    torch.manual_seed(config.seed)
    held_out = load_all(held_out_set, max(1, config.num_workers))[0].to(device)
    training = _Training(model_config, config, side, device)
    if state is None:
        (output_dir / METRICS).unlink(missing_ok=True)
    else:
        training.load(state)
        log.info("resuming at step %d of %d", training.done, config.steps)
    return _run(training, train_set, held_out, folder)


class _Training:
    """A tokenizer, what a step does to it, and everything that a resumed training needs.

    What is random about a step follows from its number, so that a resumed training is an uninterrupted one.
    """

    def __init__(self, model_config: VQConfig, config: TokenizerTrainConfig, side: int, device: torch.device) -> None:
        self.config, self.device = config, device
        # On a CPU the default layout is the faster one for narrow networks.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.model = VQModel(model_config).to(device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )
        self.revival = DeadCodeRevival(self.model.quantize)
        self.done = 0  # steps
        self._start = time.perf_counter()
        self.plain_steps = int(_PLAIN * config.steps)
        tokens_per_step = config.batch_size * (side // self.model.stride) ** 2
        # Between two revivals an entry of average use is chosen at least eight times.
        self.revive_every = max(20, math.ceil(8 * model_config.codebook_size / tokens_per_step))
        self._start_batches = max(4, self.revive_every // 5)  # so many, the last plain ones, start the codebook
        self._recent: deque[Tensor] = deque(maxlen=self._start_batches)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.revival.counts,
            "elapsed_sec": self.seconds(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.done = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.revival.counts.copy_(state["counts"])
        self._start -= state["elapsed_sec"]

    def seconds(self) -> float:
        """Time spent in training, that of interrupted runs included."""
        return round(time.perf_counter() - self._start, 2)

    def first_batch(self) -> int:
        """The step whose batch is needed first: the batches that the codebook starts from are read again."""
        return self.done if self.done > self.plain_steps else max(0, self.done - self._start_batches)

    def prepare(self, step: int, batch: Tensor) -> Tensor:
        """The images of a step as the network sees them, uint8 (B, H, H, 3); also seeds what the step draws."""
        torch.manual_seed((self.config.seed << 32) + step)
        pixels = flip_half(batch) if self.config.flip else batch
        if step <= self.plain_steps:
            self._recent.append(pixels)
        return pixels

    def lr(self, step: int) -> float:
        # A step stands for its middle, so that neither the first nor the last one is wasted on a rate of zero.
        steps, peak = self.config.steps, self.config.lr
        return learning_rate(
            step + 0.5, schedule="cosine", lr=peak, min_lr=0, warmup_epochs=_WARMUP * steps, epochs=steps
        )

    def step(self, pixels: Tensor) -> dict[str, Tensor]:
        """One optimizer step; returns the loss terms."""
        if self.done == self.plain_steps:
            self._start_codebook()
        images = to_float(pixels).contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            losses, features, indices = _losses(self.model, images, quantise=self.done >= self.plain_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        self.done += 1
        if indices is not None:
            self.revival.count(indices)
            if self.done % self.revive_every == 0 and self.done - 1 < _REVIVE_UNTIL * self.config.steps:
                self.revival.revive(features, self.optimizer)
        return losses

    @torch.no_grad()
    def _start_codebook(self) -> None:
        features = [self.model.features(to_float(pixels)).flatten(0, 1) for pixels in self._recent]
        kmeans_start(self.model.quantize, torch.cat(features))
        self._recent.clear()


@dataclass(frozen=True)
class _Folder:
    """The output folder of a training, which ``record`` describes."""

    path: Path
    record: dict[str, Any]

    def read(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """State and last figures of an earlier run of this training, None where there are none.

        Raises:
            UserError: for those of another training: code caches and models depend on a tokenizer.
        """
        state, metrics = None, None
        if (self.path / METRICS).exists():
            metrics = json.loads((self.path / METRICS).read_text())
        if (self.path / STATE).exists():
            try:
                state = load_checkpoint(self.path / STATE)
            except UserError as error:
                log.warning("training starts from the beginning: %s", error)
        for found in (state, metrics):
            if found is not None:
                self._require_same(found)
        return state, metrics

    def _require_same(self, found: dict[str, Any]) -> None:
        before, now = self._flat(found), self._flat(self.record)
        for name, value in now.items():
            if name not in ("num_workers", "eval_freq") and before.get(name) != value:
                raise UserError(
                    f"{self.path} holds a tokenizer trained with {name} {before.get(name)}, not {value}; give another "
                    "--output_dir, or delete this one."
                )

    def _flat(self, values: dict[str, Any]) -> dict[str, Any]:
        values = json.loads(json.dumps({name: values.get(name) for name in self.record}))
        return {**values["tokenizer"], **values["training"], "number of training images": values["train_images"]}

    def save_tokenizer(self, model: VQModel, step: int, metrics: dict[str, float], pixels: Tensor) -> None:
        """Write the tokenizer, its figures, and a picture of what it makes of images, uint8 (N, H, H, 3)."""
        save_tokenizer(model, self.path / TOKENIZER)
        write_json(self.path / METRICS, {"step": step, **self.record, **metrics})
        save_png(reconstruction_grid(model, pixels), self.path / "reconstructions.png")

    def save_state(self, state: dict[str, Any]) -> None:
        with atomic_write(self.path / STATE) as file:
            torch.save({**state, **self.record}, file)


def _run(training: _Training, train_set: Subset, held_out: Tensor, folder: _Folder) -> dict[str, float]:
    """The steps that are left, measured and saved on the way; returns the last figures."""
    config, device = training.config, training.device
    metrics: dict[str, float] = {
        "train_images": len(train_set),
        "held_out_images": len(held_out),
        "parameters": sum(p.numel() for p in training.model.parameters()),
    }
    steps = range(training.first_batch(), config.steps)
    batches = read_batches(train_set, steps, config.batch_size, config.seed, config.num_workers, device)
    with (
        StopSignal() as stop,
        MetricsWriter(folder.path / "metrics.jsonl", training.done) as writer,
        tqdm(total=config.steps, initial=training.done, desc="tokenizer", unit="step") as bar,
    ):
        for step, batch in zip(steps, batches, strict=True):
            pixels = training.prepare(step, batch)
            if step < training.done:
                continue
            losses = training.step(pixels)
            bar.update()
            done, finished = training.done, training.done == config.steps
            measuring = finished or done % config.eval_freq == 0
            if measuring:
                quality = evaluate(training.model, held_out, config.batch_size)
                seconds = training.seconds()
                values = {name: round(float(value.detach()), 6) for name, value in losses.items()}
                writer.write(step=done, lr=training.lr(step), **values, **quality, elapsed_sec=seconds)
                metrics |= {**quality, "train_sec": seconds}
                folder.save_tokenizer(training.model, done, metrics, held_out[:_PICTURES])
            told = None if finished else stop.signal
            if told is not None or (measuring and not finished):
                folder.save_state(training.state())
            if told is not None:
                log.info("stopped at step %d of %d; run the same command again to resume", done, config.steps)
                raise SystemExit(exit_status(told))
    (folder.path / STATE).unlink(missing_ok=True)
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


@torch.no_grad()
def reconstruction_grid(model: VQModel, pixels: Tensor) -> Image.Image:
    """Originals, uint8 (N, H, H, 3) on the model's device, above what the tokenizer makes of them."""
    reconstructed = to_uint8(model.decode(model.encode(to_float(pixels))))
    return image_grid(torch.cat([pixels, reconstructed]).cpu(), len(pixels), row_titles=["original", "reconstruction"])


@dataclass(frozen=True)
class TokenizerCommand:
    """What ``python -m tokenizers.train`` does.

    Raises:
        UserError: for settings out of their ranges, or that do not go together.
    """

    data_path: Path = setting(help="images: one subfolder per class, or photos.npz:train")
    output_dir: Path = setting(help="folder for the results; made if missing")
    tokenizer: VQConfig = part("tokenizer")
    training: TokenizerTrainConfig = part("training")
    test_path: Path | None = setting(None, "images to measure on (default: a part of --data_path is held out)")
    img_size: int = setting(256, "side of the centre crop, pixels", at_least=1)
    stride: int = setting(16, "pixels per token and side: 1, 2, 4, 8 or 16")
    epochs: int | None = setting(None, "passes over the training images, instead of --steps", at_least=1)
    skip_broken: bool = setting(False, "leave out images that cannot be read")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")

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
    config = command.training
    dataset = open_images(command.data_path, command.img_size, command.skip_broken)
    test_set = None
    if command.test_path is not None:
        test_set = open_images(command.test_path, command.img_size, command.skip_broken)
    if command.epochs is not None:
        held_out = held_out_count(len(dataset), config.held_out) if test_set is None else 0
        steps = math.ceil(command.epochs * (len(dataset) - held_out) / config.batch_size)
        config = dataclasses.replace(config, steps=steps)
    log.info("%s", command.tokenizer)
    log.info("%s on %s", config, device)
    torch.backends.cudnn.benchmark = True  # one shape throughout
    metrics = train_tokenizer(dataset, command.tokenizer, config, command.output_dir, device, test_set)
    print(
        f"{command.output_dir / TOKENIZER}: PSNR {metrics['psnr_db']:.2f} dB on {metrics['held_out_images']} "
        f"held-out images, {metrics['codebook_share']:.1%} of {command.tokenizer.codebook_size} codes in use "
        f"(perplexity {metrics['codebook_perplexity']:.1f}), {metrics['train_sec']:.0f} s"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
