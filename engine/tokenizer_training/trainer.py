"""The training of a tokenizer: steps, measurements, and what they leave in a folder.

Reconstruction (L1 + L2, LPIPS where its weights are given), codebook and commitment losses with the straight-through
estimator (van den Oord et al., arXiv:1711.00937) on normalised vectors (Yu et al., arXiv:2110.04627), and later an
adversarial loss. The network first runs a little without quantisation; then the codebook starts from k-means over
encoder outputs, and dead entries are revived, so that it does not collapse.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.tokenizer_training.adversarial import MIN_SIZE, Adversary, adaptive_weight
from engine.tokenizer_training.codebook import DeadCodeRevival, kmeans_start
from engine.tokenizer_training.data import flip_half, read_batches, split
from engine.tokenizer_training.losses import Pass, forward
from engine.tokenizer_training.perceptual import load_lpips
from engine.tokenizer_training.quality import Interrupted, evaluate
from engine.training.optim import EMA
from tokenizers.checkpoint import load_tokenizer, save_tokenizer
from tokenizers.vq_model import VQConfig, VQModel
from util.checkpoint import load_checkpoint, save_torch
from util.config import check, record, setting
from util.data.loading import Images, load_all
from util.errors import UserError, reading
from util.files import write_json
from util.folder_lock import FolderLock
from util.logger import MetricsWriter
from util.lr_sched import learning_rate
from util.pictures import image_grid, save_png, to_float, to_uint8
from util.signals import StopSignal, exit_status

log = logging.getLogger(__name__)

_WARMUP = 0.05  # share of the steps in which the learning rate rises
_PLAIN = 0.05  # share of the steps without quantisation
_REVIVE_UNTIL = 0.7  # after this share of the steps entries are no longer moved and the decoder settles
_PICTURES = 12
TOKENIZER, METRICS, LOG, STATE = "tokenizer.pt", "metrics.json", "metrics.jsonl", "state.pth"


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How to train. The learning rate rises to ``lr``, then falls to 0. UserError for a setting out of its range."""

    steps: int = setting(help="optimizer steps; more than before extend a finished training", at_least=1)
    batch_size: int = setting(64, "images per step", at_least=1)
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


def train_tokenizer(
    dataset: Images,
    model_config: VQConfig,
    config: TokenizerTrainConfig,
    output_dir: Path,
    device: torch.device,
    test_set: Images | None = None,
) -> dict[str, Any]:
    """Train on part of ``dataset`` and measure on the rest; with a ``test_set`` train on all and measure on that.

    Writes into ``output_dir``, every ``eval_freq`` steps once the codebook is in use, and at the end: ``tokenizer.pt``,
    ``metrics.json``, ``reconstructions.png`` (held-out images above their reconstructions) and a line of
    ``metrics.jsonl``; and ``state.pth``, from which the same call resumes, exactly as if it had not been interrupted,
    and from which a call with more steps goes on. A finished training is left as it is. A stop signal saves it.

    Returns:
        What ``metrics.json`` holds: on the held-out images ``psnr_db``, ``ssim``, ``codebook_share`` (of entries chosen
        at all) and ``codebook_perplexity``; counts, ``train_sec`` and the configurations.

    Raises:
        UserError: when the images are fewer than two or too small for the discriminator, the folder holds a tokenizer
            trained otherwise, another process writes to it, or the tokenizer to start from has another size.
        FloatingPointError: when the training diverges; what was saved before is kept.
        SystemExit: when a stop signal came and the state is saved, with status 75; 130 for Ctrl-C.
    """
    if test_set is None:
        train_set, held_out_set = split(dataset, config.held_out, config.seed)
    else:
        train_set, held_out_set = dataset, test_set
    side = held_out_set[0][0].shape[0]
    if config.adversarial_weight and side < MIN_SIZE:
        raise UserError(f"--adversarial_weight needs pictures of at least {MIN_SIZE} pixels; these have {side}.")
    described = {"tokenizer": record(model_config), "training": record(config), "train_images": len(train_set)}
    with FolderLock(output_dir) as lock:
        lock.acquire()
        state, metrics = _read_earlier(output_dir, described)
        if metrics is not None and metrics["step"] == config.steps and (output_dir / TOKENIZER).exists():
            log.info("the training is finished: all %d steps are done", config.steps)
            return metrics
        held_out = load_all(held_out_set, max(1, config.num_workers))[0].to(device)
        training = _Training(model_config, config, output_dir, described, held_out)
        if state is not None:
            try:
                with reading("training state", output_dir / STATE):
                    training.load(state)
                log.info("resuming at step %d of %d", training.done, config.steps)
            except UserError as error:
                _start_over(error, metrics)
                training = _Training(model_config, config, output_dir, described, held_out)
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
            _start_over(error, metrics)
    for found in filter(None, (state, metrics)):
        before = _flat(found)
        for name, value in _flat(described).items():
            # A record of an earlier version may lack a name.
            if name in ("num_workers", "eval_freq") or before.get(name, value) == value:
                continue
            if name == "steps" and value > before[name] and state is not None:
                continue
            remedy = ", or delete this one" if name != "steps" else f"; without its {STATE} it can't be trained further"
            raise UserError(
                f"{folder} holds a tokenizer trained with {name} {before[name]}, not {value}; give another "
                f"--output_dir{remedy}."
            )
    return state, metrics


def _start_over(error: UserError, metrics: dict[str, Any] | None) -> None:
    """Say that a state can't be used; UserError where the tokenizer of a finished training would be lost by it."""
    if metrics is not None and metrics["step"] == metrics["training"]["steps"]:
        raise error
    log.warning("training starts from the beginning: %s", error)


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
        torch.manual_seed(config.seed)
        self.model = self._placed(_initial_model(model_config, config.vqgan_path))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )
        self.lpips = load_lpips(config.lpips_path, held_out.device) if config.lpips_path else None
        self.revival = DeadCodeRevival(self.model.quantize)
        self.adversary: Adversary | None = None
        self.ema: EMA | None = None
        self.done = 0  # steps
        self.ema_updates = 0
        self.revived = 0  # entries, since the last measurement
        self.losses: dict[str, float] = {}  # of the last step before a save
        self._start = time.perf_counter()
        self.plain_steps = int(_PLAIN * config.steps)
        self.quantises = False
        if config.vqgan_path is not None:  # its codebook is in use
            self._start_quantising()
        tokens_per_step = config.batch_size * (held_out.shape[1] // self.model.stride) ** 2
        # Between two revivals an entry of average use is chosen at least eight times.
        self.revive_every = max(20, math.ceil(8 * model_config.codebook_size / tokens_per_step))
        # The codebook starts from the images of the last plain steps.
        self._recent: deque[Tensor] = deque(maxlen=max(4, self.revive_every // 5))

    def _placed(self, module: VQModel) -> VQModel:
        return module.to(self.held_out.device).to(memory_format=self.layout)  # type: ignore[call-overload]

    def _start_quantising(self) -> None:
        self.quantises = True
        if self.config.ema:
            self.ema = EMA(self.model, self.config.ema)

    def _start_adversary(self) -> Adversary:
        return Adversary(self.config.disc_width, self.held_out.device, self.layout)

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.revival.counts.copy_(state["counts"])
        self.done, self.revived, self.losses = int(state["step"]), int(state["revived"]), dict(state["losses"])
        if state["quantises"]:
            self._start_quantising()
        if self.ema is not None:
            self.ema.load(state["model_ema"])
            self.ema_updates = int(state["ema_updates"])
        if state["adversary"] is not None:
            self.adversary = self._start_adversary()
            self.adversary.load_state_dict(state["adversary"])
        self._start -= float(state["elapsed_sec"])

    def save(self) -> None:
        state = {
            "step": self.done,
            "model": self.model.state_dict(),
            "model_ema": self.ema and self.ema.average,
            "ema_updates": self.ema_updates,
            "optimizer": self.optimizer.state_dict(),
            "adversary": self.adversary and self.adversary.state_dict(),
            "counts": self.revival.counts,
            "revived": self.revived,
            "losses": self.losses,
            "quantises": self.quantises,
            "elapsed_sec": self.seconds(),
        }
        save_torch(self.folder / STATE, state | self.described)

    def seconds(self) -> float:
        """Time spent in training, that of interrupted runs included."""
        return round(time.perf_counter() - self._start, 2)

    def run(self, train_set: Images) -> dict[str, Any]:
        """The steps that are left, measured and saved on the way; returns the last figures."""
        config, metrics = self.config, self.described
        # Where the codebook has not started yet, the batches it starts from are read again.
        again = 0 if self.quantises else self._recent.maxlen or 0
        steps = range(max(0, self.done - again), config.steps)
        batches = read_batches(
            train_set, steps, config.batch_size, config.seed, config.num_workers, self.held_out.device
        )
        resumed_to_measure = self.done > 0 and self._is_due() and self.quantises
        with (
            StopSignal() as stop,
            contextlib.closing(MetricsWriter(self.folder / LOG, self.done - resumed_to_measure)) as writer,
            tqdm(total=config.steps, initial=self.done, desc="tokenizer", unit="step") as bar,
        ):
            if resumed_to_measure:  # the state is saved before it is measured
                metrics = self._measure(writer, stop)
            for step, batch in zip(steps, batches, strict=True):
                pixels = self._prepare(step, batch)
                if step < self.done:
                    continue
                losses = self._step(pixels)
                bar.update()
                if self._is_due() or stop.signal is not None:
                    self._require_finite(*losses.values(), *self.model.parameters())
                    self.losses = {name: round(float(value.detach()), 6) for name, value in losses.items()}
                    self.save()
                if self._is_due() and self.quantises:
                    metrics = self._measure(writer, stop)
                if self.done < config.steps:
                    self._heed(stop)
        return metrics

    def _is_due(self) -> bool:
        return self.done == self.config.steps or self.done % self.config.eval_freq == 0

    def _heed(self, stop: StopSignal) -> None:
        if stop.signal is not None:
            log.info("stopped at step %d of %d; run the same command again to resume", self.done, self.config.steps)
            raise SystemExit(exit_status(stop.signal))

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
        if not self.quantises:
            self._recent.append(pixels)
        return pixels

    def _step(self, pixels: Tensor) -> dict[str, Tensor]:
        """One optimizer step; returns the loss terms."""
        config = self.config
        if not self.quantises and self.done >= self.plain_steps:
            self._start_codebook()
        images = to_float(pixels).contiguous(memory_format=self.layout)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.bf16):
            made = forward(self.model, images, self.quantises, self.lpips, config.lpips_weight)
        # A step stands for its middle, so that neither the first nor the last one is wasted on a rate of zero.
        epoch, warmup = self.done + 0.5, _WARMUP * config.steps
        factor = learning_rate(epoch, schedule="cosine", lr=1, min_lr=0, warmup_epochs=warmup, epochs=config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        self.optimizer.zero_grad(set_to_none=True)
        losses = made.reconstruction | made.codebook
        if self._is_adversarial():
            losses |= self._adversarial_backward(made, images, config.disc_lr * factor)
        else:
            torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        self.done += 1
        if self.ema is not None:
            # At first the average follows quickly: it starts from weights that have learnt little.
            self.ema.update(min(config.ema, (1 + self.ema_updates) / (10 + self.ema_updates)))
            self.ema_updates += 1
        self._revive(made, losses)
        return losses

    def _is_adversarial(self) -> bool:
        """Whether the adversarial loss counts in this step; once begun it stays, in a longer training too."""
        config = self.config
        begins = config.adversarial_weight > 0 and self.done >= config.adversarial_start * config.steps
        if self.adversary is None and self.quantises and begins:
            self.adversary = self._start_adversary()
        return self.adversary is not None

    def _adversarial_backward(self, made: Pass, images: Tensor, lr: float) -> dict[str, Tensor]:
        """Gradients of all losses, the adversarial one included, and a step of the discriminator; returns its figures.

        Both image losses are differentiated as far as the images, so that the discriminator and the decoder are gone
        through once, weighted adaptively.
        """
        adversary, config = self.adversary, self.config
        assert adversary is not None
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bf16):
            fooling = adversary.generator_loss(made.images)
        (pulls_back,) = torch.autograd.grad(torch.stack(list(made.reconstruction.values())).sum(), made.images)
        (pulls_out,) = torch.autograd.grad(fooling, made.images)
        last = self.model.decoder.conv_out.weight
        weight = config.adversarial_weight * adaptive_weight(made.images, pulls_back, pulls_out, last)
        codebook = list(made.codebook.values())
        torch.autograd.backward(
            [made.images, *codebook], [pulls_back + weight * pulls_out, *map(torch.ones_like, codebook)]
        )
        discriminator = adversary.step(images, made.images.detach(), lr, config.bf16)
        return {"adversarial": fooling, "adversarial_weight": weight, "discriminator": discriminator}

    def _revive(self, made: Pass, losses: dict[str, Tensor]) -> None:
        # The codebook of a tokenizer to start from stays: what these pictures do not use may serve others.
        if made.indices is None or self.config.vqgan_path is not None:
            return
        self.revival.count(made.indices)
        if self.done % self.revive_every == 0 and self.done - 1 < _REVIVE_UNTIL * self.config.steps:
            self._require_finite(*losses.values())  # features are drawn by their distances
            replaced = self.revival.revive(made.features, self.optimizer)
            self.revived += len(replaced)
            if self.ema is not None:
                entries = self.ema.average["quantize.embedding.weight"]
                entries[replaced] = self.model.quantize.embedding.weight.detach()[replaced].to(entries.dtype)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        features = [self.model.features(to_float(pixels)).flatten(0, 1) for pixels in self._recent]
        kmeans_start(self.model.quantize, torch.cat(features))
        self._recent.clear()
        self._start_quantising()

    def _saved_model(self) -> VQModel:
        """The model that is measured and saved: that of the averaged weights, where there are any."""
        if self.ema is None:
            return self.model
        with torch.random.fork_rng(devices=[]):  # the constructor draws random weights first
            averaged = self._placed(VQModel(self.model.config))
        averaged.load_state_dict(self.model.state_dict() | self.ema.average)
        return averaged

    @torch.no_grad()
    def _measure(self, writer: MetricsWriter, stop: StopSignal) -> dict[str, Any]:
        """Measure on the held-out images; write the figures, the tokenizer and a picture; returns the figures."""
        model, seconds = self._saved_model(), self.seconds()
        try:
            quality = evaluate(model, self.held_out, self.config.batch_size, lambda: stop.signal is not None)
        except Interrupted:
            self._heed(stop)
            raise
        self._require_finite(torch.tensor(list(quality.values())))
        lr = self.optimizer.param_groups[0]["lr"]
        writer.write(step=self.done, lr=lr, **self.losses, **quality, revived=self.revived, elapsed_sec=seconds)
        self.revived = 0
        metrics = {
            "step": self.done,
            **self.described,
            "held_out_images": len(self.held_out),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **quality,
            "train_sec": seconds,
        }
        save_tokenizer(model, self.folder / TOKENIZER)
        write_json(self.folder / METRICS, metrics)
        # Evenly over all, since data sets are ordered by class.
        shown = torch.linspace(0, len(self.held_out) - 1, min(_PICTURES, len(self.held_out))).round().long()
        originals = self.held_out[shown.to(self.held_out.device)]
        made = to_uint8(model.decode(model.encode(to_float(originals))))
        pictures = torch.cat([originals, made]).cpu()
        grid = image_grid(pictures, len(originals), row_titles=["original", "reconstruction"])
        save_png(grid, self.folder / "reconstructions.png")
        return metrics


def _initial_model(config: VQConfig, start: Path | None) -> VQModel:
    """A model with random weights, or with those of the tokenizer to start from. UserError if its size differs."""
    if start is None:
        return VQModel(config)
    model = load_tokenizer(start).requires_grad_(True).train()
    wanted, found = record(config), record(model.config)
    for name in wanted:
        if name != "img_size" and wanted[name] != found[name]:
            raise UserError(
                f"{start} has {name} {found[name]}, not {wanted[name]}; leave out --{name} to take its size."
            )
    model.config = config
    return model
