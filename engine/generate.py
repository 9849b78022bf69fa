"""Parallel decoding with a key/value cache (arXiv 2507.01957, section 3.3).

Shape legend: `B` images, `L` tokens of an image, `N` rows or tokens of a step, `V` codes; `G` = B, or 2B with guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from models.kv_cache import KVCache
from models.lpd import LPD
from models.sampling import CFG_SCHEDULES, exponential_noise, guidance_weights, guide, sample
from util.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn from logits; `temperature`, `top_k`, `top_p` apply in this order (0 and 1 switch off)."""

    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether the batch is doubled, second half without class."""
        return self.cfg != 1.0

    def check(self, vocab_size: int) -> None:
        """Raise UserError for a setting that makes no sense."""
        if not 1.0 <= self.cfg < math.inf:
            raise UserError(f"cfg is {self.cfg}; it must be at least 1 (1 means no guidance).")
        if self.cfg_schedule not in CFG_SCHEDULES:
            raise UserError(f"cfg_schedule is {self.cfg_schedule!r}; choose one of {', '.join(CFG_SCHEDULES)}.")
        if not 0.0 < self.temperature < math.inf:
            raise UserError(
                f"temperature is {self.temperature}; it must be positive (for greedy decoding use top_k = 1)."
            )
        if not 0 <= self.top_k <= vocab_size:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) to {vocab_size}, the number of codes.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off).")


def check_batch(
    model: LPD, labels: torch.Tensor | None, orders: torch.Tensor, seeds: torch.Tensor, guided: bool
) -> None:
    """Raise UserError where a batch does not fit the model. Values are looked at, so tensors should be on the host."""
    B, L = len(orders), model.config.num_tokens
    if orders.shape != (B, L):
        raise UserError(f"orders have shape {tuple(orders.shape)}; they must be (batch, {L}).")
    wrong = (orders.sort(dim=1).values != torch.arange(L, device=orders.device)).any(dim=1).nonzero()
    if wrong.numel():
        raise UserError(f"row {int(wrong[0])} of the orders is no permutation of 0 to {L - 1}.")
    if labels is None and guided:
        raise UserError("cfg is not 1 but there are no labels to guide towards; decode without labels at cfg 1.")
    if labels is not None:
        if labels.shape != (B,):
            raise UserError(
                f"labels have shape {tuple(labels.shape)}, orders {tuple(orders.shape)}; give one per order."
            )
        classes = model.config.class_num
        wrong = labels[(labels < 0) | (labels >= classes)]
        if wrong.numel():
            raise UserError(f"label {int(wrong[0])} is out of range; the model has classes 0 to {classes - 1}.")
    if seeds.shape != (B,):
        raise UserError(f"seeds have shape {tuple(seeds.shape)}; there are {B} orders, so give ({B},).")


def draw_codes(
    logits_GNV: torch.Tensor,
    weights_N: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_BN: torch.Tensor,
    sampling: Sampling,
) -> torch.Tensor:
    """Codes (B, N) int64 of one step: guidance, then the draw, in float32 (float64 logits stay so)."""
    logits = logits_GNV if logits_GNV.dtype == torch.float64 else logits_GNV.float()
    if sampling.guided:
        conditional, unconditional = logits.chunk(2)
        logits = guide(conditional, unconditional, weights_N)
    noise = exponential_noise(seeds_B, positions_BN, logits.shape[-1])
    return sample(logits, noise, sampling.temperature, sampling.top_k, sampling.top_p)


def make_cache(model: LPD, rows: int) -> KVCache:
    """Cache for `rows` sequences (twice the batch with guidance), in the dtype that attention will run in."""
    config, weight = model.config, model.pos_embed
    kind = weight.device.type
    return KVCache(
        config.depth,
        rows,
        config.num_heads,
        capacity=1 + config.num_tokens,
        head_dim=config.embed_dim // config.num_heads,
        device=weight.device,
        dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype,
    )


def decode(
    model: LPD,
    labels_B: torch.Tensor | None,
    orders_BL: torch.Tensor,
    seeds_B: torch.Tensor,
    group_sizes: Sequence[int],
    sampling: Sampling,
    cache: KVCache,
    draw: Callable[..., torch.Tensor] = draw_codes,
) -> torch.Tensor:
    """The decoding loop: codes (B, L) int64 in raster order.

    All tensors are int64 and on the model's device, and right (:func:`check_batch`). Every shape follows from the group
    sizes, and nothing is read back from the device.
    """
    B, L = orders_BL.shape
    weights_L = guidance_weights(sampling.cfg, sampling.cfg_schedule, L, orders_BL.device)
    orders_GL = orders_BL.repeat(2, 1) if sampling.guided else orders_BL
    class_G1D = model.embed_class(labels_B, B)
    if sampling.guided:
        class_G1D = torch.cat([class_G1D, model.embed_class(None, B)])
    cache.length = 0
    groups: list[torch.Tensor] = []
    known_GN: torch.Tensor | None = None
    positions = orders_GL.split(list(group_sizes), dim=1)
    for targets_GQ, weights_Q in zip(positions, weights_L.split(list(group_sizes)), strict=True):
        if known_GN is None:
            rows_GND, num_context = torch.cat([class_G1D, model.embed_queries(targets_GQ)], dim=1), 1
        else:
            codes_GN = groups[-1].repeat(2, 1) if sampling.guided else groups[-1]
            rows_GND, num_context = model.embed_step(codes_GN, known_GN, targets_GQ), known_GN.shape[1]
        logits_GQV = model.decode_step(rows_GND, num_context, cache)
        groups.append(draw(logits_GQV, weights_Q, seeds_B, targets_GQ[:B], sampling))
        known_GN = targets_GQ
    return torch.empty_like(orders_BL).scatter_(1, orders_BL, torch.cat(groups, dim=1))


@torch.inference_mode()
def generate(
    model: LPD,
    labels: torch.Tensor | None,
    orders: torch.Tensor,
    group_sizes: Sequence[int],
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Generate the codes of B images, `group_sizes[s]` of each at step s.

    A step feeds the codes of the group before (the class token at the first step) and the queries of its own group. To
    run the same schedule many times, :class:`engine.decoder.Decoder` is faster.

    Args:
        model: in eval mode; it decides device and dtype (autocast is honoured).
        labels: integer (B,) classes, or None to decode without a class (then `cfg` must be 1).
        orders: integer (B, L), each row a permutation of raster indices.
        group_sizes: tokens per step, summing to L.
        cfg: guidance scale ≥ 1; above 1 the batch is doubled, second half without class.
        cfg_schedule: "linear" (grows to `cfg` along the order) or "constant".
        temperature, top_k, top_p: applied in this order; top_k 0 and top_p 1 are off.
        seeds: integer (B,). An image's draws follow its seed and nothing else in the batch. By default drawn from
            torch's generator.

    Returns:
        int64 (B, L) codes in raster order.

    Raises:
        UserError: for settings, labels or shapes that do not fit the model.
    """
    device = model.pos_embed.device
    sampling = Sampling(cfg, cfg_schedule, temperature, top_k, top_p)
    sampling.check(model.config.vocab_size)
    model.check_inputs(orders, group_sizes)
    if model.training:
        raise UserError("the model is in training mode; call model.eval() before generating.")
    if seeds is None:
        seeds = torch.randint(2**62, (len(orders),))
    check_batch(model, labels, orders, seeds, sampling.guided)
    labels = None if labels is None else labels.to(device, torch.int64)
    orders, seeds = orders.to(device, torch.int64), seeds.to(device, torch.int64)
    cache = make_cache(model, len(orders) * (2 if sampling.guided else 1))
    return decode(model, labels, orders, seeds, group_sizes, sampling, cache)
