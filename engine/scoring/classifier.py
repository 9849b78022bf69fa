"""A small image classifier: the feature extractor for data far from ImageNet, and a judge of the class asked for.

Any architecture of timm serves. :mod:`engine.scoring.classifier_training` trains it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
