"""Pure functions on logits: guidance, filtering, and the categorical draw from noise that belongs to each image.

Shape legend: `B` images, `N` tokens of a step, `V` codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from util.config import check, setting
from util.counter_rng import fold_in, random_bits
from util.errors import UserError

CFG_SCHEDULES = ("linear", "constant")
_SCAN, _RACE = 128, 512  # codes that one program of a GPU sums up, or draws the best of


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn from logits: guidance, then temperature, top-k and top-p in this order.

    Raises:
        UserError: for a value out of its range.
    """

    cfg: float = setting(1.0, "guidance scale; 1 is none", at_least=1, at_most=1e6, note="1 means no guidance")
    cfg_schedule: str = setting(
        "linear", "guidance along the order: growing to the scale, or constant", choices=CFG_SCHEDULES
    )
    temperature: float = setting(1.0, "divides the logits", above=0, note="for greedy decoding use top_k = 1")
    top_k: int = setting(0, "draw from the k most probable codes; 0: off", at_least=0)
    top_p: float = setting(1.0, "draw from the most probable codes that make up this share; 1: off", above=0, at_most=1)

    def __post_init__(self) -> None:
        check(self, prefix="")

    @property
    def guided(self) -> bool:
        """Whether the batch is doubled, second half without class."""
        return self.cfg != 1.0

    def check_top_k(self, vocab_size: int) -> None:
        """Raise UserError where `top_k` is above the number of codes."""
        if self.top_k > vocab_size:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) to {vocab_size}, the number of codes.")


def guidance_weights(cfg: float, schedule: str, num_tokens: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Guidance weight of each token by its index t in generation order, float32 (L,).

    `linear`: w_t = 1 + (cfg - 1) · t / L, so it grows within a group too; `constant`: w_t = cfg.
    """
    if schedule == "constant":
        return torch.full((num_tokens,), cfg, device=device)
    return 1.0 + (cfg - 1.0) * torch.arange(num_tokens, device=device) / num_tokens


def guide(conditional_BNV: torch.Tensor, unconditional_BNV: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance: u + w · (c - u)."""
    return unconditional_BNV + weights_N[:, None] * (conditional_BNV - unconditional_BNV)


def filter_logits(logits_BNV: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Set what top-k (0 = off), then top-p (1 = off) exclude to -inf.

    Top-p keeps the smallest set of most probable codes whose probabilities sum to at least `top_p`.
    """
    if 0 < top_k < logits_BNV.shape[-1]:
        threshold = logits_BNV.topk(top_k, dim=-1).values[..., -1:]
        logits_BNV = logits_BNV.masked_fill(logits_BNV < threshold, -torch.inf)
    if top_p < 1.0:
        sorted_logits, codes = logits_BNV.sort(dim=-1, descending=True)
        probabilities = sorted_logits.softmax(dim=-1)
        mass_before = _running_sum(probabilities) - probabilities
        excluded = torch.zeros_like(logits_BNV, dtype=torch.bool).scatter(-1, codes, mass_before >= top_p)
        logits_BNV = logits_BNV.masked_fill(excluded, -torch.inf)
    return logits_BNV


def _running_sum(x_BNV: torch.Tensor) -> torch.Tensor:
    """`x.cumsum(-1)` in two stages, in blocks and over blocks: torch.compile fails on so long a sum on a GPU."""
    V = x_BNV.shape[-1]
    blocks = F.pad(x_BNV, (0, -V % _SCAN)).unflatten(-1, (-1, _SCAN))
    sums = blocks.sum(dim=-1)
    before = sums.cumsum(dim=-1) - sums
    return (before[..., None] + blocks.cumsum(dim=-1)).flatten(-2)[..., :V]


def _argmax(x_BNV: torch.Tensor) -> torch.Tensor:
    """`x.argmax(-1)`, the first of equals, in two stages, so that a GPU's programs share the work on few rows."""
    if x_BNV.shape[-1] % _RACE:
        return x_BNV.argmax(dim=-1)
    best, code = x_BNV.unflatten(-1, (-1, _RACE)).max(dim=-1)
    chunk = best.argmax(dim=-1, keepdim=True)
    return (chunk * _RACE + code.gather(-1, chunk)).squeeze(-1)


def image_seeds(seed: int, numbers: torch.Tensor) -> torch.Tensor:
    """Seeds of the images with these numbers (B,), int64: a function of `seed` and the number alone."""
    return fold_in(torch.tensor(seed), numbers)


def noise_keys(seeds_B: torch.Tensor, positions_BN: torch.Tensor) -> torch.Tensor:
    """Keys int64 (B, N) of the noise at raster indices `positions_BN` of images with these seeds, int64 too."""
    return fold_in(seeds_B[:, None], positions_BN)


def exponential_noise(keys_BN: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Standard exponential noise, float32 (B, N, V), > 0: a function of (seed, position, code) and nothing else.

    Neither the batch an image is in, nor the step a position is decoded at, nor the device changes the bits it gets.

    Args:
        keys_BN: of :func:`noise_keys`.
    """
    bits = random_bits(keys_BN, num_codes)
    # Floats hold small bits exactly; small uniforms become the small exponentials that win the race.
    uniform = (bits.float() + 0.5) * 2.0**-31
    return -torch.log1p(-uniform.clamp(max=1.0 - 2.0**-24))


def sample(
    logits_BNV: torch.Tensor,
    noise_BNV: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Categorical draw by the exponential race: argmax of p / noise. No read-back from the device.

    Args:
        logits_BNV: float32 or float64.
        noise_BNV: standard exponential noise.

    Returns:
        int64 (B, N) codes.
    """
    filtered = filter_logits(logits_BNV / temperature, top_k, top_p)
    return _argmax(filtered - noise_BNV.log())
