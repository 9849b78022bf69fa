"""Train a small tokenizer on a folder of images: ``python -m tokenizers.train --data_path FOLDER --output_dir DIR ...``.

Reconstruction (L1 + L2), codebook and commitment losses on normalised vectors with the straight-through estimator (van den
Oord et al., arXiv:1711.00937; normalised as in Yu et al., arXiv:2110.04627). The codebook starts from k-means over encoder
outputs and dead entries are revived, so that it does not collapse.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset
from tqdm import tqdm

from tokenizers.checkpoint import save_tokenizer
from tokenizers.codebook_training import DeadCodeRevival, codebook_use, kmeans_start
from tokenizers.vq_model import VQConfig, VQModel
from util.data import ImageFolder
from util.dist import resolve_device
from util.errors import UserError, exit_on_user_error
from util.files import write_json
from util.images import image_grid, save_png, to_float, to_uint8
from util.logger import MetricsWriter, setup_logging

log = logging.getLogger(__name__)

_COMMITMENT = 0.25
_REVIVE_UNTIL = 0.7  # share of the training after which entries stay where they are and the decoder settles
_KMEANS_FEATURES = 2**17  # encoder outputs the codebook starts from, at most
_IN_MEMORY_BYTES = 2 * 2**30  # data sets up to this size are decoded once and kept on the device
_HELD_OUT_MAX = 2000
_PICTURES = 12


class ImageDataset(Protocol):
    """Map-style: item i is (uint8 tensor (H, H, 3), label), all of one size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class TrainConfig:
    """How to train. ``steps`` optimizer steps of ``batch_size`` images; ``plain_steps`` of them, at the start, without
    quantisation; ``held_out`` is the share of the images kept for measuring. Raises UserError for impossible values."""

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 50
    plain_steps: int = 50
    eval_freq: int = 500
    held_out: float = 0.1
    flip: bool = False
    bf16: bool = False
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("eval_freq", 1), ("warmup_steps", 0), ("plain_steps", 0)):
            if getattr(self, name) < low:
                raise UserError(f"--{name} {getattr(self, name)} must be at least {low}.")
        if self.num_workers < 0:
            raise UserError(f"--num_workers {self.num_workers} must be at least 0.")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr {self.lr} must be positive.")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held_out {self.held_out} must lie between 0 and 1.")


def train_tokenizer(
    dataset: ImageDataset, model_config: VQConfig, config: TrainConfig, output_dir: Path, device: torch.device
) -> dict[str, float]:
    """Train on part of ``dataset``, measure on the rest.

    Writes ``tokenizer.pt`` (every ``eval_freq`` steps and at the end), ``metrics.jsonl`` (during training), ``metrics.json``
    (the returned figures) and ``reconstructions.png`` (held-out images above their reconstructions) into ``output_dir``.

    Returns the held-out ``psnr_db`` and ``codebook_share`` (entries used), ``codebook_perplexity``, and the time.

    Raises:
        UserError: when the images don't fit the tokenizer's stride or there are fewer than two.
    """
    torch.manual_seed(config.seed)
    train_set, held_out_set = _split(dataset, config)
    side = len(dataset[0][0])
    if side % model_config.stride:
        raise UserError(f"Images of {side} pixels are no multiple of the tokenizer's stride {model_config.stride}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)

    model = VQModel(model_config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    held_out = _load_all(held_out_set, config, device)
    tokens_per_step = config.batch_size * (side // model.stride) ** 2
    # Long enough for an entry of average use to be chosen eight times between two checks.
    revive_every = max(20, math.ceil(8 * model_config.codebook_size / tokens_per_step))
    revival = DeadCodeRevival(model.quantize)
    start = time.perf_counter()
    metrics: dict[str, float] = {}

    with MetricsWriter(output_dir / "metrics.jsonl") as writer:
        batches = _batches(train_set, config, device)
        for step, pixels in enumerate(tqdm(batches, total=config.steps, desc="tokenizer", unit="step")):
            lr = _learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if step == config.plain_steps:
                kmeans_start(model.quantize, _sample_features(model, train_set, config, device))
            images = to_float(pixels).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                losses, features, indices = _losses(model, images, quantise=step >= config.plain_steps)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            optimizer.step()

            if step >= config.plain_steps:
                revival.count(indices)
                if (step + 1) % revive_every == 0 and step < _REVIVE_UNTIL * config.steps:
                    revival.revive(features, optimizer)
            last = step + 1 == config.steps
            if last or (step + 1) % config.eval_freq == 0:
                metrics = evaluate(model, held_out, config)
                writer.write(
                    step=step + 1,
                    lr=lr,
                    **{name: round(float(value), 6) for name, value in losses.items()},
                    **metrics,
                    elapsed_sec=round(time.perf_counter() - start, 2),
                )
                save_tokenizer(model, output_dir / "tokenizer.pt")
    metrics |= {"train_sec": round(time.perf_counter() - start, 2), "train_images": len(train_set)}
    metrics |= {"held_out_images": len(held_out_set), "parameters": sum(p.numel() for p in model.parameters())}
    write_json(output_dir / "metrics.json", {**metrics, "tokenizer": asdict(model_config), "training": asdict(config)})
    save_png(reconstruction_grid(model, held_out[:_PICTURES]), output_dir / "reconstructions.png")
    return metrics


def _losses(model: VQModel, images: Tensor, *, quantise: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The weighted loss terms, the unit vectors (N, K) before quantisation, detached, and their indices."""
    features = model.features(images)
    losses = {}
    if quantise:
        indices = model.quantize.nearest(features)
        entries = model.quantize.lookup(indices)
        losses["codebook"] = (entries - features.detach()).square().mean()
        losses["commitment"] = _COMMITMENT * (entries.detach() - features).square().mean()
        decoded = model.decode_features(features + (entries - features).detach())
    else:
        indices = torch.zeros(features.shape[:-1], dtype=torch.int64, device=features.device)
        decoded = model.decode_features(features)
    error = decoded.float() - images
    losses["l1"] = error.abs().mean()
    losses["l2"] = error.square().mean()
    return losses, features.detach().flatten(0, 1), indices


@torch.no_grad()
def evaluate(model: VQModel, pixels: Tensor, config: TrainConfig) -> dict[str, float]:
    """PSNR (dB, mean over images) and codebook use over uint8 images (N, H, H, 3)."""
    counts = torch.zeros(model.config.codebook_size, device=pixels.device)
    psnr = []
    for batch in pixels.split(config.batch_size):
        images = to_float(batch)
        indices = model.encode(images)
        error = ((model.decode(indices).clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
        psnr.append(-10 * error.clamp_min(1e-10).log10())
        counts += torch.bincount(indices.flatten(), minlength=len(counts))
    share, perplexity = codebook_use(counts)
    return {
        "psnr_db": round(float(torch.cat(psnr).mean()), 3),
        "codebook_share": round(share, 4),
        "codebook_perplexity": round(perplexity, 2),
    }


@torch.no_grad()
def reconstruction_grid(model: VQModel, pixels: Tensor):
    images = model.decode(model.encode(to_float(pixels)))
    both = torch.cat([pixels, to_uint8(images)]).cpu()
    return image_grid(both, len(pixels), row_titles=["original", "reconstruction"])


def _learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _split(dataset: ImageDataset, config: TrainConfig) -> tuple[Subset, Subset]:
    count = len(dataset)
    if count < 2:
        raise UserError(f"{count} image(s) are too few: one part trains the tokenizer and another measures it.")
    held_out = min(max(1, round(config.held_out * count)), _HELD_OUT_MAX, count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    return Subset(dataset, order[held_out:]), Subset(dataset, order[:held_out])


def _load_all(subset: Subset, config: TrainConfig, device: torch.device) -> Tensor:
    """All images of a subset, uint8 (N, H, H, 3), on the device."""
    loader = DataLoader(subset, batch_size=256, num_workers=config.num_workers)
    return torch.cat([images for images, _ in loader]).to(device)


def _batches(train_set: Subset, config: TrainConfig, device: torch.device) -> Iterator[Tensor]:
    """``steps`` shuffled uint8 batches on the device; every image comes once before any comes again."""
    generator = torch.Generator().manual_seed(config.seed)
    sampler = RandomSampler(train_set, num_samples=config.steps * config.batch_size, generator=generator)
    if len(train_set) * train_set[0][0].numel() <= _IN_MEMORY_BYTES:
        images = _load_all(train_set, config, device)
        batches = (images[indices] for indices in BatchSampler(sampler, config.batch_size, drop_last=False))
    else:
        loader = DataLoader(
            train_set, config.batch_size, sampler=sampler, num_workers=config.num_workers, pin_memory=device.type == "cuda"
        )
        batches = (images.to(device, non_blocking=True) for images, _ in loader)
    for batch in batches:
        if config.flip:
            flipped = torch.rand(len(batch), 1, 1, 1, device=device) < 0.5
            batch = torch.where(flipped, batch.flip(2), batch)
        yield batch


@torch.no_grad()
def _sample_features(model: VQModel, train_set: Subset, config: TrainConfig, device: torch.device) -> Tensor:
    short = dataclasses.replace(config, steps=8)
    return torch.cat([model.features(to_float(p)).flatten(0, 1) for p in _batches(train_set, short, device)])
def main():
    import sys, json
    kw=json.loads(sys.argv[1]); mk=json.loads(sys.argv[2]); data=sys.argv[3]; size=int(sys.argv[4]); out=sys.argv[5]
    torch.set_num_threads(int(os.environ.get("NT","2")))
    print(train_tokenizer(ImageFolder(data,size), VQConfig(**mk), TrainConfig(**kw), Path(out), torch.device('cpu')))
if __name__=="__main__": main()
