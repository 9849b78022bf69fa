"""Train a small tokenizer on images: ``python -m tokenizers.train --data_path FOLDER --output_dir DIR ...``.

Reconstruction (L1 + L2), codebook and commitment losses with the straight-through estimator (van den Oord et al.,
arXiv:1711.00937) on normalised vectors (Yu et al., arXiv:2110.04627). The network first runs a little without
quantisation; then the codebook starts from k-means over encoder outputs, and dead entries are revived, so that it does
not collapse.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokenizers.checkpoint import save_tokenizer
from tokenizers.codebook_training import DeadCodeRevival, codebook_use, kmeans_start
from tokenizers.training_data import everything, flip_half, held_out_count, read_batches, split
from tokenizers.vq_model import VQConfig, VQModel
from util.checkpoint import load_checkpoint
from util.cli import HelpFormatter, exit_on_user_error
from util.data.images import open_images
from util.data.loading import Images, load_all
from util.dist import resolve_device
from util.errors import UserError
from util.files import atomic_write, write_json
from util.logger import MetricsWriter, setup_logging
from util.lr_sched import learning_rate
from util.pictures import image_grid, save_png, to_float, to_uint8
from util.signals import StopSignal, exit_status

log = logging.getLogger(__name__)

_MULTIPLIERS = {1: (1,), 2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}  # defaults, by stride
_COMMITMENT = 0.25  # weight of the commitment loss, as in both papers
_WARMUP = 0.05  # share of the steps in which the learning rate rises
_PLAIN = 0.05  # share of the steps without quantisation
_REVIVE_UNTIL = 0.7  # after this share of the steps entries are no longer moved and the decoder settles
_PICTURES = 12
STATE = "state.pth"  # of an unfinished training


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How to train: ``steps`` steps of ``batch_size`` images; the learning rate rises to ``lr``, then falls to 0.

    Every ``eval_freq`` steps the share ``held_out`` of the images is measured and everything saved. ``flip`` mirrors
    half of the images at random, ``bf16`` runs the network under bfloat16 autocast.

    Raises:
        UserError: for impossible values.
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    eval_freq: int = 500
    held_out: float = 0.1
    flip: bool = False
    bf16: bool = False
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("eval_freq", 1), ("num_workers", 0)):
            if getattr(self, name) < low:
                raise UserError(f"--{name} {getattr(self, name)} must be at least {low}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} must be at least 0 and below 2^32.")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr {self.lr} must be positive.")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held_out {self.held_out} must lie between 0 and 1.")


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
    returned figures and the settings), ``reconstructions.png`` (held-out images above their reconstructions) and a line
    of ``metrics.jsonl``. Until it is finished ``state.pth`` lies beside them, from which the same call goes on, exactly
    as if it had not been interrupted. A finished training is left as it is. A stop signal saves it after the step.

    Returns:
        On the held-out images: ``psnr_db``, ``codebook_share`` (of entries chosen at all) and ``codebook_perplexity``;
        then counts and ``train_sec``.

    Raises:
        UserError: when the images don't fit the tokenizer's stride or are fewer than two, or the folder holds the
            training of other settings.
        SystemExit: when a stop signal came and the state is saved, with status 75; 130 for Ctrl-C.
    """
    train_set, held_out_set = (
        split(dataset, config.held_out, config.seed)
        if test_set is None
        else (everything(dataset), everything(test_set))
    )
    side = len(dataset[0][0])
    if side % model_config.stride:
        raise UserError(f"Images of {side} pixels are no multiple of the tokenizer's stride {model_config.stride}.")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {str(output_dir)!r} is a file and should be a folder.")
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer": asdict(model_config), "training": asdict(config), "train_images": len(train_set)}
    state = _read_state(output_dir / STATE)
    earlier = _read_metrics(output_dir / "metrics.json")
    for found in (state, earlier):
        if found is not None:
            _check_settings(found, settings, output_dir)
    if earlier is not None and earlier["step"] == config.steps and (output_dir / "tokenizer.pt").exists():
        log.info("the training is finished: all %d steps are done", config.steps)
        return {name: value for name, value in earlier.items() if name not in ("step", *settings)}
    start_step = 0 if state is None else state["step"]
    if state is None:
        for name in ("metrics.json", "metrics.jsonl"):
            (output_dir / name).unlink(missing_ok=True)

    torch.manual_seed(config.seed)
    held_out = load_all(held_out_set, max(1, config.num_workers))[0].to(device)
    # On a CPU the default layout is the faster one for narrow networks.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = VQModel(model_config).to(device).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    revival = DeadCodeRevival(model.quantize)
    tokens_per_step = config.batch_size * (side // model.stride) ** 2
    # Between two checks an entry of average use is chosen at least eight times.
    revive_every = max(20, math.ceil(8 * model_config.codebook_size / tokens_per_step))
    recent: deque[Tensor] = deque(maxlen=max(4, revive_every // 5))
    plain_steps = int(_PLAIN * config.steps)
    # The batches that the codebook starts from are read again.
    first_step = start_step if start_step > plain_steps else max(0, start_step - (recent.maxlen or 0))
    steps = range(first_step, config.steps)
    batches = read_batches(train_set, steps, config.batch_size, config.seed, config.num_workers, device)
    elapsed = 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        revival.counts.copy_(state["counts"])
        elapsed = state["elapsed_sec"]
        log.info("going on from step %d of %d", start_step, config.steps)
    metrics: dict[str, float] = {
        "train_images": len(train_set),
        "held_out_images": len(held_out_set),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    start = time.perf_counter() - elapsed

    def save_state(step: int) -> None:
        seconds = round(time.perf_counter() - start, 2)
        progress = {"step": step, "counts": revival.counts, "elapsed_sec": seconds}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **progress, **settings}
        with atomic_write(output_dir / STATE) as file:
            torch.save(state, file)

    with (
        StopSignal() as stop,
        MetricsWriter(output_dir / "metrics.jsonl", start_step) as writer,
        tqdm(total=config.steps, initial=start_step, desc="tokenizer", unit="step") as bar,
    ):
        for step, batch in enumerate(batches, start=first_step):
            # What is random about a step follows from its number, so that a resumed run is an uninterrupted one.
            torch.manual_seed((config.seed << 32) + step)
            pixels = flip_half(batch) if config.flip else batch
            # A step stands for its middle, so that neither the first nor the last one is wasted on a rate of zero.
            lr = learning_rate(
                step + 0.5,
                schedule="cosine",
                lr=config.lr,
                min_lr=0,
                warmup_epochs=_WARMUP * config.steps,
                epochs=config.steps,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            if step <= plain_steps:
                recent.append(pixels)
            if step < start_step:
                continue
            if step == plain_steps:
                with torch.no_grad():
                    kmeans_start(model.quantize, torch.cat([model.features(to_float(p)).flatten(0, 1) for p in recent]))
                recent.clear()

            images = to_float(pixels).contiguous(memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                losses, features, indices = _losses(model, images, quantise=step >= plain_steps)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            bar.update()
            if indices is not None:
                revival.count(indices)
                if (step + 1) % revive_every == 0 and step < _REVIVE_UNTIL * config.steps:
                    revival.revive(features, optimizer)

            if (step + 1) % config.eval_freq == 0 or step + 1 == config.steps:
                values = {name: round(float(value.detach()), 6) for name, value in losses.items()}
                quality = evaluate(model, held_out, config.batch_size)
                metrics |= {**quality, "train_sec": round(time.perf_counter() - start, 2)}
                writer.write(step=step + 1, lr=lr, **values, **quality, elapsed_sec=metrics["train_sec"])
                save_tokenizer(model, output_dir / "tokenizer.pt")
                write_json(output_dir / "metrics.json", {"step": step + 1, **settings, **metrics})
                save_png(reconstruction_grid(model, held_out[:_PICTURES]), output_dir / "reconstructions.png")
                if step + 1 < config.steps:
                    save_state(step + 1)
            if stop.signal is not None and step + 1 < config.steps:
                save_state(step + 1)
                log.info("stopped at step %d of %d; run the same command again to go on", step + 1, config.steps)
                raise SystemExit(exit_status(stop.signal))
    (output_dir / STATE).unlink(missing_ok=True)
    return metrics


def _read_state(path: Path) -> dict[str, Any] | None:
    """The state of an interrupted training, or None."""
    if not path.exists():
        return None
    try:
        return load_checkpoint(path)
    except UserError as error:
        log.warning("starting anew: %s", error)
        return None


def _read_metrics(path: Path) -> dict[str, Any] | None:
    """What an earlier training measured last, with its settings, or None."""
    return json.loads(path.read_text()) if path.exists() else None


def _check_settings(found: dict[str, Any], settings: dict[str, Any], output_dir: Path) -> None:
    """Refuse to go on from, or to replace, what was trained with other settings; caches depend on a tokenizer."""

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        values = json.loads(json.dumps({name: values.get(name) for name in settings}))
        return {**values["tokenizer"], **values["training"], "number of training images": values["train_images"]}

    before, now = flat(found), flat(settings)
    for name, value in now.items():
        if name not in ("num_workers", "eval_freq") and before.get(name) != value:
            raise UserError(
                f"--output_dir {output_dir} holds a tokenizer trained with {name} {before.get(name)}, not {value}; "
                "give another folder, or delete this one."
            )


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizers.train",
        description="Train a small VQ tokenizer on images; writes tokenizer.pt, metrics.json, metrics.jsonl "
        "and reconstructions.png.",
        formatter_class=HelpFormatter,
    )
    defaults = TokenizerTrainConfig(steps=1)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="images: one subfolder per class, or photos.npz:train",
    )
    data.add_argument(
        "--test_path", type=Path, help="images to measure on (default: a part of --data_path is held out)"
    )
    data.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="folder for the results; made if missing",
    )
    data.add_argument("--img_size", type=int, default=256, help="side of the centre crop, pixels")
    data.add_argument(
        "--held_out", type=float, default=defaults.held_out, help="share of the images kept for measuring"
    )
    data.add_argument("--flip", action="store_true", help="mirror half of the training images at random")
    data.add_argument("--skip_broken", action="store_true", help="leave out images that can't be read")
    data.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1), help="image readers")

    size = parser.add_argument_group("tokenizer")
    size.add_argument("--stride", type=int, default=16, choices=list(_MULTIPLIERS), help="pixels per token and side")
    size.add_argument("--base_width", type=int, default=64, help="channels at full resolution")
    size.add_argument(
        "--multipliers",
        type=int,
        nargs="+",
        default=argparse.SUPPRESS,
        help="width of each resolution, fine to coarse, in multiples of the base width (default: by stride, "
        + ", ".join(f"{stride}: {' '.join(map(str, values))}" for stride, values in _MULTIPLIERS.items())
        + ")",
    )
    size.add_argument("--res_blocks", type=int, default=2, help="residual blocks per resolution (decoder: one more)")
    size.add_argument("--z_channels", type=int, default=256, help="channels next to the codebook")
    size.add_argument("--codebook_size", type=int, default=1024, help="number of codes")
    size.add_argument("--code_dim", type=int, default=8, help="numbers per code")

    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=int, default=argparse.SUPPRESS, help="passes over the training images")
    length.add_argument("--steps", type=int, default=argparse.SUPPRESS, help="optimizer steps")
    training.add_argument("--batch_size", type=int, default=defaults.batch_size, help="images per step")
    training.add_argument("--lr", type=float, default=defaults.lr, help="highest learning rate")
    training.add_argument("--eval_freq", type=int, default=defaults.eval_freq, help="measure and save every N steps")
    training.add_argument("--bf16", action="store_true", help="bfloat16 autocast (for GPUs)")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    training.add_argument("--seed", type=int, default=defaults.seed, help="of the split, the weights and the batches")
    return parser


def main() -> None:
    args = _parser().parse_args()
    setup_logging()
    device = resolve_device(args.device)
    multipliers = tuple(getattr(args, "multipliers", _MULTIPLIERS[args.stride]))
    model_config = VQConfig(
        args.base_width, multipliers, args.res_blocks, args.z_channels, args.codebook_size, args.code_dim
    )
    if model_config.stride != args.stride:
        levels = len(_MULTIPLIERS[args.stride])
        raise UserError(f"--multipliers {multipliers} must be {levels} numbers for --stride {args.stride}.")
    if args.img_size < 1 or args.img_size % args.stride:
        raise UserError(f"--img_size {args.img_size} must be a positive multiple of --stride {args.stride}.")
    names = ("batch_size", "lr", "eval_freq", "held_out", "flip", "bf16", "num_workers", "seed")
    config = TokenizerTrainConfig(steps=getattr(args, "steps", 1), **{name: getattr(args, name) for name in names})
    dataset = open_images(args.data_path, args.img_size, args.skip_broken)
    test_set = None if args.test_path is None else open_images(args.test_path, args.img_size, args.skip_broken)
    if "epochs" in args:
        if args.epochs < 1:
            raise UserError(f"--epochs {args.epochs} must be at least 1.")
        held_out = held_out_count(len(dataset), config.held_out) if test_set is None else 0
        config = dataclasses.replace(
            config, steps=math.ceil(args.epochs * (len(dataset) - held_out) / config.batch_size)
        )
    log.info("%s", model_config)
    log.info("%s on %s", config, device)
    torch.backends.cudnn.benchmark = True  # one shape throughout
    metrics = train_tokenizer(dataset, model_config, config, args.output_dir, device, test_set)
    print(
        f"{args.output_dir / 'tokenizer.pt'}: PSNR {metrics['psnr_db']:.2f} dB on {metrics['held_out_images']} "
        f"held-out images, {metrics['codebook_share']:.1%} of {args.codebook_size} codes in use (perplexity "
        f"{metrics['codebook_perplexity']:.1f}), {metrics['train_sec']:.0f} s"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
