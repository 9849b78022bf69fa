"""A small image classifier: the feature extractor for data far from ImageNet, and a judge of the class asked for.

Any architecture of timm serves. The whole data set is kept in memory as bytes and augmented in batches on the device.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from util.checkpoint import load_checkpoint
from util.config import check, setting
from util.errors import UserError
from util.files import atomic_write


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is built from."""

    arch: str = setting(help="timm architecture")
    num_classes: int = setting(help="number of classes", at_least=1)
    img_size: int = setting(help="side of the crops it is trained on, pixels", at_least=1)
    input_size: int = setting(help="side that images are resized to; many networks need larger ones", at_least=1)

    def __post_init__(self) -> None:
        check(self, prefix="")


class Classifier(nn.Module):
    """A timm network that takes bytes: uint8 (B, 3, H, W) of any size → logits (B, K)."""

    network: Any  # what nn.Module knows of it hides timm's methods

    def __init__(self, config: ClassifierConfig) -> None:
        import timm  # takes seconds to import, which a run scored with Inception does not need

        super().__init__()
        if config.arch not in timm.list_models():
            raise UserError(f"--arch {config.arch!r} is not a timm model; resnet18 and test_resnet are two that are.")
        self.config = config
        self.network = timm.create_model(config.arch, num_classes=config.num_classes, in_chans=3)
        self.feature_dim: int = self.network.head_hidden_size

    def _prepare(self, images: Tensor) -> Tensor:
        pixels = images.float() / 127.5 - 1
        side = self.config.input_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return pixels.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self._prepare(images))

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled features (B, d) and the logits (B, K) they give, in one pass."""
        features = self.network.forward_head(self.network.forward_features(self._prepare(images)), pre_logits=True)
        return features, self.network.get_classifier()(features)


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


def train_classifier(
    model: Classifier, images: Tensor, labels: Tensor, config: ClassifierTrainConfig, device: torch.device
) -> None:
    """Train ``model`` in place on uint8 (N, 3, S, S) and labels int64 (N,); bf16 on a GPU. Leaves it in eval mode."""
    images, labels = images.to(device), labels.to(device)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    batch_size = min(config.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    total_steps = config.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    # The cycle needs one step at least on each side of its peak.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, max(total_steps, 10), pct_start=0.2)
    generator = torch.Generator(device).manual_seed(config.seed)
    with tqdm(total=total_steps, desc="training the classifier", unit="step", mininterval=0.5) as progress:
        for _ in range(config.epochs):
            order = torch.randperm(len(images), generator=generator, device=device)
            for rows in order[: steps_per_epoch * batch_size].view(steps_per_epoch, batch_size):
                batch = augment(images[rows], config, generator)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(batch)
                loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=config.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
    model.eval()


@torch.inference_mode()
def accuracy(model: Classifier, images: Tensor, labels: Tensor, device: torch.device, batch_size: int = 256) -> float:
    """Share of images uint8 (N, 3, S, S) whose most probable class is the label.

    Raises:
        FloatingPointError: if logits are not finite, which a training that diverged leaves.
    """
    logits = torch.cat([model(batch.to(device)) for batch in images.split(batch_size)])
    if not logits.isfinite().all():
        raise FloatingPointError("the classifier's outputs are not finite: its training diverged; give a lower --lr.")
    return int((logits.argmax(1) == labels.to(device)).sum()) / len(images)


def save_classifier(
    model: Classifier, classes: tuple[str, ...], path: str | Path, metadata: dict[str, Any] | None = None
) -> None:
    """Write weights, configuration, class names and ``metadata`` (plain data) to one file, atomically."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {"model": state, "config": asdict(model.config), "classes": list(classes), "metadata": metadata or {}}
    with atomic_write(path) as file:
        torch.save(content, file)


def load_classifier(path: str | Path, device: torch.device | str = "cpu") -> tuple[Classifier, tuple[str, ...]]:
    """A classifier in eval mode with frozen parameters, and the names of its classes in label order.

    Raises:
        UserError: if the file is damaged or not one of :func:`save_classifier`.
    """
    content = load_checkpoint(path)
    try:
        config, classes = ClassifierConfig(**content["config"]), tuple(content["classes"])
        with torch.random.fork_rng(devices=[]):  # the constructor draws random weights first
            model = Classifier(config)
        model.load_state_dict(content["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a classifier; python -m engine.classifier makes one.") from error
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False), classes
