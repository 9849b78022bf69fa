"""The adversarial loss: the step is LlamaGen's, written out plainly, and its parts are what their papers say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.tokenizer_training.adversarial import MIN_SIZE, PatchDiscriminator, hinge_loss
from engine.tokenizer_training.losses import forward
from engine.tokenizer_training.trainer import _Training
from tests.helpers.tokenizer_case import CPU, FULL, LARGE, Blobs
from util.pictures import to_float


def test_a_step_is_that_of_the_published_formula(tmp_path: Path) -> None:
    """In float64, with a backward of its own for each weight; guards against a graph that is cut or gone through twice.

    The images are differentiated once for both losses here, and each gradient is weighted there.
    """
    training = _Training(LARGE, FULL, tmp_path, {}, 24, CPU, None)
    training.model.double()
    adversary = training.adversary = training._start_adversary()
    adversary.network.double()
    model, discriminator = copy.deepcopy(training.model), copy.deepcopy(adversary.network)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=1e-4)
    images = to_float(Blobs(24).images[:5]).double()

    made = forward(training.model, images, quantise=True)
    losses = training._adversarial_backward(made, images, lr=1e-2)

    features = model.features(images)
    entries = model.quantize.lookup(model.quantize.nearest(features))
    output = model.decode_features(features + (entries - features).detach())
    reconstruction = (output - images).abs().mean() + (output - images).pow(2).mean()
    fooling = -discriminator(output).mean()
    last = model.decoder.conv_out.weight
    (pull_back,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (pull_out,) = torch.autograd.grad(fooling, last, retain_graph=True)
    weight = (pull_back.norm() / (pull_out.norm() + 1e-4)).clamp(0, 1e4).detach()
    codebook = (entries - features.detach()).pow(2).mean() + 0.25 * (entries.detach() - features).pow(2).mean()
    (reconstruction + codebook + 0.5 * weight * fooling).backward()
    optimizer.zero_grad()
    real, fake = discriminator(images), discriminator(output.detach())
    loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    loss.backward()
    optimizer.step()

    expected = {"adversarial": fooling, "adversarial_weight": 0.5 * weight, "discriminator": loss}
    assert {name: float(value.detach()) for name, value in losses.items()} == pytest.approx(
        {name: float(value.detach()) for name, value in expected.items()}, rel=1e-12
    )
    assert float(weight) > 0
    for ours, theirs in ((training.model, model), (adversary.network, discriminator)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None, name
            assert b.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-14, msg=name)
    for a, b in zip(adversary.network.parameters(), discriminator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_discriminator_sees_patches_of_70_pixels() -> None:
    """Isola et al., section 6.1.2; also that the smallest size is the smallest."""
    network = PatchDiscriminator(4).eval()
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = network(image)
    assert logits.shape == (1, 1, 30, 30)
    (gradient,) = torch.autograd.grad(logits[0, 0, 15, 15], image)
    seen = gradient.abs().sum(1)[0].nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]
    assert network(torch.zeros(1, 3, MIN_SIZE, MIN_SIZE)).numel() == 1
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, MIN_SIZE - 1, MIN_SIZE - 1))


def test_hinge_loss_of_known_logits() -> None:
    def loss(real: float, made: float) -> Tensor:
        return hinge_loss(torch.tensor([float(real)]), torch.tensor([float(made)]))

    assert loss(2, -3) == 0  # sure and right
    assert loss(0, 0) == 1
    assert loss(-1, 0.5) == pytest.approx(0.5 * (2 + 1.5))
