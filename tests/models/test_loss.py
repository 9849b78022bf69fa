"""The chunked loss against the plain one, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.loss import linear_cross_entropy
from tests.helpers.fake_gpu import NoCopiesBetweenDevices, fake_gpu


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    features = torch.randn(10, 6, dtype=dtype, requires_grad=True)
    weight = (2 * torch.randn(7, 6, dtype=dtype)).requires_grad_()
    return features, weight, torch.randint(7, (10,))


@pytest.mark.parametrize("chunk_elements", [1, 21, 35, 1000])
def test_loss_and_gradients_equal_the_plain_ones(chunk_elements: int) -> None:
    """Chunks of 1, 3 (the last is smaller), 5 and all rows; a factor behind the loss reaches both gradients."""
    features, weight, targets = case(torch.float64)
    loss = linear_cross_entropy(features, weight, targets, chunk_elements=chunk_elements)
    plain = F.cross_entropy(features @ weight.T, targets)
    torch.testing.assert_close(loss, plain, rtol=1e-14, atol=1e-14)
    gradients, expected = (torch.autograd.grad(1.7 * value, (features, weight)) for value in (loss, plain))
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)


def test_gradcheck() -> None:
    features, weight, targets = case(torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets, chunk_elements=20), (features, weight)
    )


def test_autocast_narrows_the_products_and_nothing_else() -> None:
    """Same loss as a bf16 head with a float32 softmax, and float32 gradients."""
    features, weight, targets = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(features, weight, targets, chunk_elements=21)
        plain = F.cross_entropy(F.linear(features, weight).float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    gradients, expected = (torch.autograd.grad(value, (features, weight)) for value in (loss, plain))
    torch.testing.assert_close(gradients, expected, rtol=2e-2, atol=2e-3)


def test_large_logits_stay_finite() -> None:
    features = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = linear_cross_entropy(features, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 1e4
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.gpu
def test_compiled_on_a_gpu_equals_plain() -> None:
    features, weight = (torch.randn(n, 64, device="cuda").requires_grad_() for n in (512, 1000))
    targets = torch.randint(1000, (512,), device="cuda")
    results = []
    for fused in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            loss = linear_cross_entropy(features, weight, targets, chunk_elements=128_000, fused=fused)
        results.append((loss.detach(), *torch.autograd.grad(loss, (features, weight))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_loss_and_gradients_are_float32_on_a_gpu_and_made_without_waiting(bf16: bool) -> None:
    """On one that is not there. The gradients are kept from the forward pass on."""
    with fake_gpu(), torch.device("cuda"):
        features, weight, targets = case(torch.float32)
        with NoCopiesBetweenDevices(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = linear_cross_entropy(features, weight, targets, chunk_elements=21)
        assert loss.grad_fn is not None
        kept = loss, *loss.grad_fn.saved_tensors  # type: ignore[attr-defined]
        assert [tuple(tensor.shape) for tensor in kept] == [(), (10, 6), (7, 6)]
        assert {(tensor.device.type, tensor.dtype) for tensor in kept} == {("cuda", torch.float32)}
