"""Train a small tokenizer on an image folder: ``python -m tokenizers.train --data_path FOLDER --output_dir DIR ...``.

Reconstruction (L1 + L2), codebook and commitment losses with the straight-through estimator (van den Oord et al.,
arXiv:1711.00937) on normalised vectors (Yu et al., arXiv:2110.04627). The network first runs a little without
quantisation; then the codebook starts from k-means over encoder outputs, and dead entries are revived, so that it does
not collapse.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset
from tqdm import tqdm

from tokenizers.checkpoint import save_tokenizer
from tokenizers.codebook_training import DeadCodeRevival, codebook_use, kmeans_start
from tokenizers.vq_model import VQConfig, VQModel
from util.data import ImageFolder
from util.dist import resolve_device
from util.errors import UserError, exit_on_user_error
from util.files import write_json
from util.help import HelpFormatter
from util.images import image_grid, save_png, to_float, to_uint8
from util.logger import MetricsWriter, setup_logging
from util.lr_sched import learning_rate

log = logging.getLogger(__name__)

_MULTIPLIERS = {1: (1,), 2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}  # defaults, by stride
_COMMITMENT = 0.25  # weight of the commitment loss, as in both papers
_WARMUP = 0.05  # share of the steps in which the learning rate rises
_PLAIN = 0.05  # share of the steps without quantisation
_REVIVE_UNTIL = 0.7  # after this share of the steps entries are no longer moved and the decoder settles
_IN_MEMORY_BYTES = 2 * 2**30  # a data set up to this size is decoded once and kept on the device
_HELD_OUT_MAX = 2000  # images
_PICTURES = 12


class ImageDataset(Protocol):
    """Map-style: item i is (uint8 tensor (H, H, 3), label), all of one size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class TrainConfig:
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
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr {self.lr} must be positive.")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held_out {self.held_out} must lie between 0 and 1.")


def train_tokenizer(
    dataset: ImageDataset, model_config: VQConfig, config: TrainConfig, output_dir: Path, device: torch.device
) -> dict[str, float]:
    """Train on part of ``dataset``, measure on the rest.

    Writes into ``output_dir``, every ``eval_freq`` steps and at the end: ``tokenizer.pt``, ``metrics.json`` (the
    returned figures and the settings), ``reconstructions.png`` (held-out images above their reconstructions) and a line
    of ``metrics.jsonl``. Files of an earlier run are replaced.

    Returns:
        On the held-out images: ``psnr_db``, ``codebook_share`` (of entries chosen at all) and ``codebook_perplexity``;
        then counts and ``train_sec``.

    Raises:
        UserError: when the images don't fit the tokenizer's stride or are fewer than two.
    """
    train_set, held_out_set = _split(dataset, config)
    side = len(dataset[0][0])
    if side % model_config.stride:
        raise UserError(f"Images of {side} pixels are no multiple of the tokenizer's stride {model_config.stride}.")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {str(output_dir)!r} is a file and should be a folder.")
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "metrics.jsonl"):
        (output_dir / name).unlink(missing_ok=True)

    torch.manual_seed(config.seed)
    held_out = _load_all(held_out_set, config).to(device)
    batches = _batches(train_set, config, device)
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
    metrics: dict[str, float] = {
        "train_images": len(train_set),
        "held_out_images": len(held_out_set),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    start = time.perf_counter()

    with MetricsWriter(output_dir / "metrics.jsonl") as writer:
        for step, pixels in enumerate(tqdm(batches, total=config.steps, desc="tokenizer", unit="step")):
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
                settings = {"tokenizer": asdict(model_config), "training": asdict(config)}
                write_json(output_dir / "metrics.json", {"step": step + 1, **metrics, **settings})
                save_png(reconstruction_grid(model, held_out[:_PICTURES]), output_dir / "reconstructions.png")
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


def _split(dataset: ImageDataset, config: TrainConfig) -> tuple[Subset, Subset]:
    """Training and held-out part, drawn by the seed."""
    count = len(dataset)
    if count < 2:
        raise UserError(f"{count} image(s) are too few: one part trains the tokenizer and another measures it.")
    held_out = _held_out_count(count, config.held_out)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    return Subset(dataset, order[held_out:]), Subset(dataset, order[:held_out])  # type: ignore[arg-type]


def _held_out_count(count: int, share: float) -> int:
    return min(max(1, round(share * count)), _HELD_OUT_MAX, count - 1)


def _load_all(subset: Subset, config: TrainConfig) -> Tensor:
    """All images of a subset, uint8 (N, H, H, 3). Threads will do: decoding does not hold Python's lock."""
    with ThreadPoolExecutor(max(1, config.num_workers)) as pool:
        items = tqdm(pool.map(subset.__getitem__, range(len(subset))), total=len(subset), desc="reading", unit="image")
        return torch.stack([image for image, _ in items])


def _batches(train_set: Subset, config: TrainConfig, device: torch.device) -> Iterator[Tensor]:
    """``steps`` shuffled uint8 batches (B, H, H, 3) on the device; every image comes once before any comes again."""
    generator = torch.Generator().manual_seed(config.seed)
    sampler = RandomSampler(train_set, num_samples=config.steps * config.batch_size, generator=generator)
    if len(train_set) * train_set[0][0].numel() <= _IN_MEMORY_BYTES:
        images = _load_all(train_set, config).to(device)
        batches = (images[torch.tensor(rows)] for rows in BatchSampler(sampler, config.batch_size, drop_last=False))
    else:
        loader = DataLoader(
            train_set,
            config.batch_size,
            sampler=sampler,
            num_workers=config.num_workers,
            pin_memory=device.type == "cuda",
        )
        batches = (images.to(device, non_blocking=True) for images, _ in loader)
    return map(_flip_half, batches) if config.flip else batches


def _flip_half(batch: Tensor) -> Tensor:
    mirrored = torch.rand(len(batch), 1, 1, 1, device=batch.device) < 0.5
    return torch.where(mirrored, batch.flip(2), batch)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizers.train",
        description="Train a small VQ tokenizer on an image folder; writes tokenizer.pt, metrics.json, metrics.jsonl "
        "and reconstructions.png.",
        formatter_class=HelpFormatter,
    )
    defaults = TrainConfig(steps=1)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="image folder with one subfolder per class",
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
    config = TrainConfig(steps=getattr(args, "steps", 1), **{name: getattr(args, name) for name in names})
    dataset = ImageFolder(args.data_path, args.img_size, skip_broken=args.skip_broken)
    if "epochs" in args:
        if args.epochs < 1:
            raise UserError(f"--epochs {args.epochs} must be at least 1.")
        train_images = len(dataset) - _held_out_count(len(dataset), config.held_out)
        config = dataclasses.replace(config, steps=math.ceil(args.epochs * train_images / config.batch_size))
    log.info("%s", model_config)
    log.info("%s on %s", config, device)
    torch.backends.cudnn.benchmark = True  # one shape throughout
    metrics = train_tokenizer(dataset, model_config, config, args.output_dir, device)
    print(
        f"{args.output_dir / 'tokenizer.pt'}: PSNR {metrics['psnr_db']:.2f} dB on {metrics['held_out_images']} "
        f"held-out images, {metrics['codebook_share']:.1%} of {args.codebook_size} codes in use (perplexity "
        f"{metrics['codebook_perplexity']:.1f}), {metrics['train_sec']:.0f} s"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
