"""The model that decodes by own kernels: as exact as the plain one in bfloat16, whatever steps the library takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import models.fused
from models import build_model
from models.fused import FusedLPD, fused_copy, has_kernels
from models.kv_cache import KVCache
from models.lpd import LPD, LPDConfig
from tests.helpers.tiny_models import far_from_initialisation
from tests.helpers.triton_kernels import interpreted

SIZES, KNOWN_SIZES = [1, 2, 9, 40], [30, 2, 9, 20]


def small_model() -> LPD:
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    model = build_model("lpd_debug", img_size=128, class_num=5, vocab_size=192, **sizes).eval()
    return far_from_initialisation(model, 0.2)


def logits_of(model: LPD, dtype: torch.dtype, prefilled: bool = False) -> torch.Tensor:
    """Logits of four guided steps of two images, with codes that do not depend on them; or of three behind codes that
    are known."""
    cache = KVCache(2, 4, 4, 65, 16, torch.device("cpu"), dtype)
    cache.key_values.fill_(torch.nan)
    orders = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    steps: list[torch.Tensor] = []
    known = None
    sizes = KNOWN_SIZES if prefilled else SIZES
    for targets in orders.split([*sizes, 64 - sum(sizes)], dim=1)[:4]:
        if known is None and prefilled:
            model.first_step(torch.tensor([1, 3]), targets[:, :1], True, cache)
        elif known is None:
            steps.append(model.first_step(torch.tensor([1, 3]), targets, True, cache))
        else:
            steps.append(model.next_step((known * 3 + 1) % 192, known, targets, True, cache))
        known = targets
    return torch.cat(steps, dim=1)


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("max_rows", "float8", "allowed"),
    [(256, False, 1.25), (48, False, 1.25), (0, True, 15.0)],  # all steps by own kernels; some; all, in 8 bits
)
@pytest.mark.parametrize("prefilled", [False, True])
@torch.no_grad()
def test_logits_are_as_exact_as_those_of_autocast(
    monkeypatch: pytest.MonkeyPatch, max_rows: int, float8: bool, allowed: float, prefilled: bool
) -> None:
    """By relative error to float32, as a multiple of the plain model's under autocast."""
    monkeypatch.setattr(models.fused, "MAX_ROWS", max_rows)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = small_model()
    expected = logits_of(model, torch.float32, prefilled)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits_of(model, torch.bfloat16, prefilled)
        with interpreted():
            twin = fused_copy(model, 4, 49, float8)
            fused = logits_of(twin, torch.bfloat16, prefilled)
    assert twin._kernels.max_rows == (max_rows if not float8 else 4 * 49) or max_rows > 4 * 49
    assert error(fused, expected) < allowed * error(plain, expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the copy has taken nothing from the model


def test_memory_of_the_kernels_is_the_models() -> None:
    """It is found among parameters and buffers, by which memory is kept for a stream; state dicts stay as they are."""
    model = small_model()
    twin = fused_copy(model, 2, 10)
    held = {tensor.data_ptr() for tensor in (*twin.parameters(), *twin.buffers())}
    assert twin._kernels.stream.data_ptr() in held
    assert twin._layers[1][0].weight_sums.data_ptr() in held
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_only_models_that_tiles_divide_have_kernels() -> None:
    assert has_kernels(LPDConfig())
    assert has_kernels(LPDConfig(embed_dim=1280, num_heads=20))
    assert not has_kernels(LPDConfig(embed_dim=96, num_heads=6))
    assert not has_kernels(LPDConfig(vocab_size=1000))
    assert not has_kernels(LPDConfig(num_heads=128))
    assert issubclass(FusedLPD, LPD)
