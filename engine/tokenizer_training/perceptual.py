"""The perceptual loss LPIPS (Zhang et al., arXiv:1801.03924): distance of images in the features of a VGG-16."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.checkpoint import load_checkpoint
from util.errors import UserError

MIN_SIZE = 16  # side of the pictures, pixels
FILES = (
    "--lpips_path takes vgg.pth of LPIPS 0.1 (github.com/richzhang/PerceptualSimilarity) together with torchvision's "
    "vgg16-397923af.pth, or one file with the state dict of lpips.LPIPS(net='vgg')"
)
# The layers whose features are compared, each after its ReLU, by their places in torchvision's VGG-16.
_TAPS = (3, 8, 15, 22, 29)
_CHANNELS = (64, 128, 256, 512, 512)


class LPIPS(nn.Module):
    """Two batches of images (B, 3, H, W) in [-1, 1], H and W of at least MIN_SIZE → their distances, float32 (B,)."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        from torchvision.models.vgg import cfgs, make_layers  # takes a second to import

        super().__init__()
        self.features = make_layers(cfgs["D"])[: _TAPS[-1] + 1]  # VGG-16 without its classifier
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.linear = nn.ParameterList(torch.zeros(1, channels, 1, 1) for channels in _CHANNELS)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = (torch.cat([a, b]) - self.mean) / self.std
        distance = x.new_zeros(len(a), dtype=torch.float32)
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in _TAPS:
                unit = F.normalize(x.float(), dim=1, eps=1e-10)
                difference = (unit[: len(a)] - unit[len(a) :]).square()
                distance = distance + (difference * self.linear[_TAPS.index(place)]).sum(1).mean((1, 2))
        return distance


def load_lpips(paths: Sequence[Path], device: torch.device) -> LPIPS:
    """LPIPS with the weights of these files together, frozen, on the device.

    Raises:
        UserError: if a file cannot be read, or weights are missing or of another shape.
    """
    state: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in load_checkpoint(path)["model"].items():
            # lpips numbers VGG's layers within slices, as torchvision does over all.
            name = re.sub(r"^net\.slice\d\.(\d+)\.", r"features.\1.", name)
            name = re.sub(r"^lin(\d)\.model\.1\.weight$", r"linear.\1", name)
            state[name] = tensor
    with torch.random.fork_rng(devices=[]):  # the constructor draws random weights first
        model = LPIPS()
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            files = " and ".join(map(str, paths))
            raise UserError(f"{files} lacks {name} of shape {tuple(tensor.shape)}; {FILES}.")
    model.load_state_dict({name: state[name] for name in expected})
    return model.to(device).eval().requires_grad_(False)
