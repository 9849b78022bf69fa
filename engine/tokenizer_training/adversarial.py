"""The adversarial loss that makes reconstructions sharp: a PatchGAN discriminator, hinge loss, adaptive weight.

As LlamaGen trains its tokenizer (Sun et al., arXiv:2406.06525, section 2.1), after Esser et al., "Taming Transformers"
(arXiv:2012.09841, section 3.1) and Isola et al. (arXiv:1611.07004, section 3.2.2).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_SIZE = 24  # side of the pictures, pixels
_EPSILON = 1e-4  # keeps the adaptive weight finite
_MAX_WEIGHT = 1e4


class PatchDiscriminator(nn.Sequential):
    """Images (B, 3, H, W), sides of at least MIN_SIZE → logits (B, 1, ~H/8 - 2, ~W/8 - 2), high where it looks real.

    Each is of a patch of 70 pixels; patches overlap.
    """

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, stride in ((1, 2), (2, 2), (3, 1)):
            channels = width << level
            layers += [
                nn.Conv2d(channels // 2, channels, 4, stride, 1, bias=False),  # the norm has a bias
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width << 3, 1, 4, 1, 1))
        super().__init__(OrderedDict((str(number), layer) for number, layer in enumerate(layers)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss of its logits for real images and for reconstructions, each of any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def adaptive_weight(output: Tensor, reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """How strongly the adversarial loss counts, so that both losses pull at the decoder's last layer alike.

    |∂ reconstruction loss / ∂ last_weight| / (|∂ adversarial loss / ∂ last_weight| + 1e-4), at most 1e4.

    Args:
        output: the decoder's images, with their graph, which is kept.
        reconstruction, adversarial: gradients of the two losses with respect to ``output``.
        last_weight: weight of the decoder's last layer.
    """
    norms = [
        torch.autograd.grad(output, last_weight, gradient, retain_graph=True)[0].norm()
        for gradient in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + _EPSILON)).clamp(max=_MAX_WEIGHT)


class Adversary:
    """The discriminator and its optimizer, which train beside the tokenizer."""

    def __init__(self, width: int, device: torch.device, layout: torch.memory_format) -> None:
        self.network = PatchDiscriminator(width).to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(self.network.parameters(), betas=(0.9, 0.95), weight_decay=1e-4, fused=True)

    def generator_loss(self, output: Tensor) -> Tensor:
        """What the decoder lowers: minus the mean logit of its images (B, 3, H, W)."""
        return -at_least_float32(self.network(output)).mean()

    def step(self, images: Tensor, output: Tensor, lr: float, bf16: bool) -> Tensor:
        """One optimizer step on real images (B, 3, H, W) and what the decoder made of them; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            real, made = self.network(images), self.network(output.detach())
        loss = hinge_loss(at_least_float32(real), at_least_float32(made))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
