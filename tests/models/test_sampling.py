"""The two-stage sum and argmax of the draw are the plain ones, and short enough for the compiler."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.decoding.decoder import compile_draw
from engine.decoding.loop import draw_codes
from models.sampling import Sampling, filter_logits, noise_keys, sample


class LongestScan(TorchDispatchMode):
    """Records the length of the longest cumulative sum."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.cumsum.default:
            self.length = max(self.length, args[0].shape[args[1]])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_codes", [1, 7, 128, 1000, 16384])
def test_top_p_keeps_the_codes_that_one_long_sum_keeps(num_codes: int) -> None:
    """In float64, where the order of summation decides nothing; also for numbers of codes that blocks do not divide."""
    logits = 3 * torch.randn(2, 3, num_codes, dtype=torch.float64)
    with LongestScan() as scan:
        kept = filter_logits(logits, top_p=0.9).isfinite()
    assert 0 < scan.length <= 128  # torch.compile cannot split a longer one among a GPU's programs
    probabilities, codes = logits.softmax(-1).sort(descending=True)
    first_out = (probabilities.cumsum(-1) < 0.9).sum(-1, keepdim=True) + 1
    assert torch.equal(kept.gather(-1, codes), (torch.arange(num_codes) < first_out).expand_as(kept))


@pytest.mark.parametrize("num_codes", [5, 512, 1536, 1537, 16384])
def test_the_best_code_is_the_first_of_equals(num_codes: int) -> None:
    """Few levels give many ties, in one chunk and across chunks; without noise the draw is the argmax."""
    logits = torch.randint(3, (4, 50, num_codes)).float()
    logits[0, :, :-1] = -torch.inf
    assert torch.equal(sample(logits, torch.ones_like(logits)), logits.argmax(dim=-1))


@pytest.mark.gpu
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_gpu_compiles_the_draw_for_any_number_of_rows(top_p: float) -> None:
    sampling, num_codes, compiled = Sampling(cfg=3.0, top_p=top_p), 16384, compile_draw(torch.device("cuda"))
    for B, N in [(1, 1), (1, 3), (1, 20), (8, 20), (3, 5)]:
        logits = torch.randn(2 * B, N, num_codes, device="cuda")
        weights, seeds = torch.ones(N, device="cuda"), torch.arange(B, device="cuda")
        keys = noise_keys(seeds, torch.arange(N, device="cuda").repeat(B, 1))
        arguments = logits, weights, keys, sampling
        assert torch.equal(compiled(*arguments), draw_codes(*arguments))
