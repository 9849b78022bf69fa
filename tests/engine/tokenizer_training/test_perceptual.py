"""LPIPS: the distance is that of the paper's formula, from files in both of the layouts in which they are published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from engine.tokenizer_training.perceptual import LPIPS, MIN_SIZE, load_lpips
from tests.helpers.tokenizer_case import CPU
from util.errors import UserError

CHANNELS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def vgg() -> nn.Sequential:
    """What torchvision's VGG-16 has before its classifier."""
    torch.manual_seed(1)
    return make_layers(cfgs["D"])


@pytest.fixture(scope="module")
def linear() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(1, channels, 1, 1, generator=generator) for channels in CHANNELS]


@pytest.fixture(scope="module")
def files(vgg: nn.Sequential, linear: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """vgg.pth of LPIPS 0.1, and torchvision's weights without the classifier, which is of no use here."""
    folder = tmp_path_factory.mktemp("lpips")
    state = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    torch.save({f"lin{level}.model.1.weight": weight for level, weight in enumerate(linear)}, folder / "vgg.pth")
    torch.save(state, folder / "vgg16.pth")
    return folder / "vgg.pth", folder / "vgg16.pth"


def plain_lpips(vgg: nn.Sequential, linear: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Equation 1 of Zhang et al., layer by layer."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    total, level = torch.zeros(len(a)), 0
    x, y = (a - mean) / std, (b - mean) / std
    for place, layer in enumerate(vgg):
        x, y = layer(x.clone()), layer(y.clone())
        if place in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            unit = [features / (features.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for features in (x, y)]
            total += (linear[level] * (unit[0] - unit[1]).pow(2)).sum(1).mean((1, 2))
            level += 1
    return total


def test_the_distance_is_that_of_the_formula(
    vgg: nn.Sequential, linear: list[Tensor], files: tuple[Path, Path]
) -> None:
    model = load_lpips(files, CPU)
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(a, b), plain_lpips(vgg, linear, a, b), rtol=1e-4, atol=1e-6)
        assert (model(a, a) == 0).all()
        small = a[..., :MIN_SIZE, :MIN_SIZE]
        assert model(small, -small).isfinite().all()
    output = b.clone().requires_grad_(True)
    model(a, output).sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_one_file_of_the_package_serves_too(files: tuple[Path, Path], tmp_path: Path) -> None:
    """``lpips`` cuts VGG into slices but keeps its numbers, and has its linear layers under two names."""
    parts, state = load_lpips(files, CPU), {}
    for name, tensor in parts.state_dict().items():
        if name.startswith("features."):
            number = int(name.split(".")[1])
            part = 1 + sum(number >= first for first in (4, 9, 16, 23))
            state[name.replace("features", f"net.slice{part}")] = tensor
        else:
            level = name.split(".")[1]
            state[f"lin{level}.model.1.weight"] = state[f"lins.{level}.model.1.weight"] = tensor
    torch.save(state, tmp_path / "whole.pth")
    whole = load_lpips([tmp_path / "whole.pth"], CPU)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert isinstance(whole, LPIPS)


def test_missing_weights_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vgg\.pth lacks features\.0\.weight .*--lpips_path takes vgg\.pth"):
        load_lpips(files[:1], CPU)
    with pytest.raises(UserError, match=r"lacks linear\.0"):
        load_lpips(files[1:], CPU)
    with pytest.raises(UserError, match="nowhere"):
        load_lpips([tmp_path / "nowhere"], CPU)
