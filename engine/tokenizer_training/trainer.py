"""The training of a tokenizer: steps, measurements, and what they leave in a folder.

Reconstruction (L1 + L2, LPIPS where its weights are given), codebook and commitment losses with the straight-through
estimator (van den Oord et al., arXiv:1711.00937) on normalised vectors (Yu et al., arXiv:2110.04627), and later an
adversarial loss. The network first runs a little without quantisation; then the codebook starts from k-means over
encoder outputs, and dead entries are revived, so that it does not collapse.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.tokenizer_training import adversarial, perceptual
from engine.tokenizer_training.adversarial import Adversary, adaptive_weight
from engine.tokenizer_training.codebook import DeadCodeRevival, kmeans_start
from engine.tokenizer_training.config import TokenizerTrainConfig
from engine.tokenizer_training.data import flip_half, read_batches, split
from engine.tokenizer_training.folder import LOG, METRICS, STATE, TOKENIZER, is_finished, read_earlier, start_over
from engine.tokenizer_training.losses import Pass, forward
from engine.tokenizer_training.perceptual import load_lpips
from engine.tokenizer_training.quality import Interrupted, evaluate
from engine.training.optim import EMA
from tokenizers.checkpoint import QUALITY, load_tokenizer, save_tokenizer
from tokenizers.vq_model import VQConfig, VQModel
from util.checkpoint import save_torch
from util.config import record
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
# (model, whether to stop) → figures that a classifier gives; may raise Interrupted.
Judge = Callable[[VQModel, Callable[[], bool]], dict[str, Any]]


def train_tokenizer(
    dataset: Images,
    model_config: VQConfig,
    config: TokenizerTrainConfig,
    output_dir: Path,
    device: torch.device,
    test_set: Images | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Train on part of ``dataset`` and measure on the rest; with a ``test_set`` train on all and measure on that.

    Writes into ``output_dir``, every ``eval_freq`` steps once the codebook is in use, and at the end: ``tokenizer.pt``,
    ``metrics.json``, ``reconstructions.png`` (held-out images above their reconstructions) and a line of
    ``metrics.jsonl``; and ``state.pth``, from which the same call resumes, exactly as if it had not been interrupted,
    and from which a call with more steps goes on. A finished training is left as it is; only what a judge says of it
    is added to ``metrics.json``. A stop signal saves it.

    Args:
        judge: asked at the end.

    Returns:
        What ``metrics.json`` holds: on the held-out images ``psnr_db``, ``ssim``, ``codebook_share`` (of entries chosen
        at all) and ``codebook_perplexity``; the judge's figures; counts, ``train_sec`` and the configurations.

    Raises:
        UserError: when the images are fewer than two or too small for a loss, the folder holds a tokenizer trained
            otherwise, another process writes to it, or the tokenizer to start from has another size.
        FloatingPointError: when the training diverges; what was saved before is kept.
        SystemExit: when a stop signal came and the state is saved, with status 75; 130 for Ctrl-C.
    """
    if test_set is None:
        train_set, held_out_set = split(dataset, config.held_out, config.seed)
    else:
        train_set, held_out_set = dataset, test_set
    side = held_out_set[0][0].shape[0]
    for flag, given, least in (
        ("adversarial_weight", config.adversarial_weight, adversarial.MIN_SIZE),
        ("lpips_path", config.lpips_path, perceptual.MIN_SIZE),
    ):
        if given and side < least:
            raise UserError(f"--{flag} needs pictures of at least {least} pixels; these have {side}.")
    described = {"tokenizer": record(model_config), "training": record(config), "train_images": len(train_set)}
    with FolderLock(output_dir) as lock:
        lock.acquire()
        state, metrics = read_earlier(output_dir, described)
        if state is None and metrics is not None and is_finished(output_dir, metrics):
            log.info("the training is finished: all %d steps are done", config.steps)
            if judge is not None:  # the tokenizer's file stays: caches know it by its hash
                metrics |= judge(load_tokenizer(output_dir / TOKENIZER, device), lambda: False)
                write_json(output_dir / METRICS, metrics)
            return metrics

        def begin() -> _Training:
            return _Training(model_config, config, output_dir, described, side, device, judge)

        training = begin()
        if state is not None:
            try:
                with reading("training state", output_dir / STATE):
                    training.load(state)
            except UserError as error:
                start_over(output_dir, metrics, str(error))
                training = begin()
            else:
                log.info("resuming at step %d of %d", training.done, config.steps)
        return training.run(train_set, held_out_set)


class _Training:
    """A tokenizer, what a step does to it, and what it leaves in its folder.

    What is random about a step follows from its number, so that a resumed training is an uninterrupted one.
    ``described`` tells this training from others; images have ``side`` pixels.
    """

    def __init__(
        self,
        model_config: VQConfig,
        config: TokenizerTrainConfig,
        folder: Path,
        described: dict[str, Any],
        side: int,
        device: torch.device,
        judge: Judge | None,
    ) -> None:
        self.config, self.folder, self.described = config, folder, described
        self.device, self.judge = device, judge
        # On a CPU the default layout is the faster one for narrow networks.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        torch.manual_seed(config.seed)
        self.model = self._placed(_initial_model(model_config, config.vqgan_path))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )
        self.lpips = load_lpips(config.lpips_path, device) if config.lpips_path else None
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
        self._tokens_per_image = (side // self.model.stride) ** 2
        tokens_per_step = config.batch_size * self._tokens_per_image
        # Between two revivals an entry of average use is chosen at least eight times.
        self.revive_every = max(20, math.ceil(8 * model_config.codebook_size / tokens_per_step))
        # The codebook starts from the images of the last plain steps.
        self._recent: deque[Tensor] = deque(maxlen=max(4, self.revive_every // 5))

    def _placed(self, module: VQModel) -> VQModel:
        return module.to(self.device).to(memory_format=self.layout)  # type: ignore[call-overload]

    def _start_quantising(self) -> None:
        self.quantises = True
        if self.config.ema:
            self.ema = EMA(self.model, self.config.ema)

    def _start_adversary(self) -> Adversary:
        return Adversary(self.config.disc_width, self.device, self.layout)

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.revival.counts.copy_(state["counts"])
        self.done, self.revived, self.losses = state["step"], int(state["revived"]), dict(state["losses"])
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

    def run(self, train_set: Images, held_out_set: Images) -> dict[str, Any]:
        """The steps that are left, measured and saved on the way; returns the last figures."""
        config, metrics = self.config, self.described
        self.held_out = load_all(held_out_set, max(1, config.num_workers))[0].to(self.device)
        # Where the codebook has not started yet, the batches it starts from are read again.
        again = 0 if self.quantises else self._recent.maxlen or 0
        steps = range(max(0, self.done - again), config.steps)
        batches = read_batches(train_set, steps, config.batch_size, config.seed, config.num_workers, self.device)
        resumed_to_measure = self.done > 0 and self._is_due() and self.quantises
        with (
            StopSignal() as stop,
            contextlib.closing(batches),
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
                    self._require_finite(*losses.values(), *self._parameters())
                    self.losses = {name: round(float(value.detach()), 6) for name, value in losses.items()}
                    self.save()
                if self._is_due() and self.quantises:
                    metrics = self._measure(writer, stop)
                if self.done < config.steps:
                    self._heed(stop)
        return metrics

    def _parameters(self) -> Iterator[Tensor]:
        """All that is trained."""
        yield from self.model.parameters()
        if self.adversary is not None:
            yield from self.adversary.network.parameters()

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
        rate = partial(learning_rate, epoch, schedule="cosine", min_lr=0, warmup_epochs=warmup, epochs=config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(lr=config.lr)
        self.optimizer.zero_grad(set_to_none=True)
        losses = made.reconstruction | made.codebook
        if self._is_adversarial():
            losses |= self._adversarial_backward(made, images, rate(lr=config.disc_lr))
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

        def told() -> bool:
            return stop.signal is not None

        try:
            quality: dict[str, Any] = evaluate(model, self.held_out, self.config.batch_size, told)
            self._require_finite(torch.tensor(list(quality.values())))
            if self.judge is not None and self.done == self.config.steps:
                quality |= self.judge(model, told)
        except Interrupted:
            self._heed(stop)
            raise
        lr = self.optimizer.param_groups[0]["lr"]
        writer.write(step=self.done, lr=lr, **self.losses, **quality, revived=self.revived, elapsed_sec=seconds)
        self.revived = 0
        metrics = {
            "step": self.done,
            **self.described,
            "held_out_images": len(self.held_out),
            "held_out_tokens": len(self.held_out) * self._tokens_per_image,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **quality,
            "train_sec": seconds,
        }
        save_tokenizer(model, self.folder / TOKENIZER, {name: quality[name] for name in QUALITY if name in quality})
        self._draw(model)
        write_json(self.folder / METRICS, metrics)  # last: it says that a training is finished
        return metrics

    def _draw(self, model: VQModel) -> None:
        """Write held-out images, evenly over all since data sets are ordered by class, and their reconstructions."""
        shown = torch.linspace(0, len(self.held_out) - 1, min(_PICTURES, len(self.held_out))).round().long()
        originals = self.held_out[shown.to(self.device)]
        made = to_uint8(model.decode(model.encode(to_float(originals))))
        pictures = torch.cat([originals, made]).cpu()
        grid = image_grid(pictures, len(originals), row_titles=["original", "reconstruction"])
        save_png(grid, self.folder / "reconstructions.png")


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
