"""Parallel decoding with a key/value cache (arXiv 2507.01957, section 3.3).

Shape legend: `B` images, `L` tokens of an image, `N` rows or tokens of a step, `V` codes; `G` = B, or 2B with guidance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.kv_cache import KVCache
from models.lpd import LPD
from models.sampling import CFG_SCHEDULES, exponential_noise, guidance_weights, guide, sample
from util.errors import UserError


@dataclass(frozen=True)
class Step:
    """One decoding step: it brings `num_context` known rows and predicts the tokens `start:stop` of the order."""

    num_context: int
    start: int
    stop: int


def plan_steps(group_sizes: Sequence[int]) -> list[Step]:
    """Everything about the steps that is known before the first one, from Python integers alone."""
    steps = []
    num_context, start = 1, 0  # the first step's context is the class token
    for size in group_sizes:
        steps.append(Step(num_context, start, start + size))
        num_context, start = size, start + size
    return steps


def check_sampling(
    cfg: float, cfg_schedule: str, temperature: float, top_k: int, top_p: float, vocab_size: int
) -> None:
    """Raise UserError for a sampling setting that makes no sense."""
    if not 1.0 <= cfg < math.inf:
        raise UserError(f"cfg is {cfg}; it must be at least 1 (1 means no guidance).")
    if cfg_schedule not in CFG_SCHEDULES:
        raise UserError(f"cfg_schedule is {cfg_schedule!r}; choose one of {', '.join(CFG_SCHEDULES)}.")
    if not 0.0 < temperature < math.inf:
        raise UserError(f"temperature is {temperature}; it must be positive (for greedy decoding use top_k = 1).")
    if not 0 <= top_k <= vocab_size:
        raise UserError(f"top_k is {top_k}; it must be 0 (off) to {vocab_size}, the number of codes.")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1 (off).")


def check_labels(labels_B: torch.Tensor, class_num: int) -> None:
    """Raise UserError where a label is no class of the model."""
    wrong = labels_B[(labels_B < 0) | (labels_B >= class_num)]
    if wrong.numel():
        raise UserError(f"label {int(wrong[0])} is out of range; the model has classes 0 to {class_num - 1}.")


def check_orders(orders_BL: torch.Tensor) -> None:
    """Raise UserError where a row is no permutation of the raster indices."""
    L = orders_BL.shape[1]
    wrong = (orders_BL.sort(dim=1).values != torch.arange(L, device=orders_BL.device)).any(dim=1).nonzero()
    if wrong.numel():
        raise UserError(f"row {int(wrong[0])} of the orders is no permutation of 0 to {L - 1}.")


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

    A step feeds the codes of the group before (the class token at the first step) and the queries of its own group.
    Nothing inside the loop reads a value back from the device.

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
    config, device = model.config, model.pos_embed.device
    check_sampling(cfg, cfg_schedule, temperature, top_k, top_p, config.vocab_size)
    model.check_inputs(orders, group_sizes)
    check_orders(orders)
    B, L = orders.shape
    if model.training:
        raise UserError("the model is in training mode; call model.eval() before generating.")
    if labels is None and cfg != 1.0:
        raise UserError(f"cfg is {cfg} but there are no labels to guide towards; decode without labels at cfg 1.")
    if labels is not None:
        if labels.shape != (B,):
            raise UserError(
                f"labels have shape {tuple(labels.shape)}, orders {tuple(orders.shape)}; give one per order."
            )
        check_labels(labels, config.class_num)
        labels = labels.to(device, torch.int64)
    if seeds is None:
        seeds = torch.randint(2**62, (B,))
    elif seeds.shape != (B,):
        raise UserError(f"seeds have shape {tuple(seeds.shape)}; there are {B} orders, so give ({B},).")
    orders, seeds = orders.to(device, torch.int64), seeds.to(device, torch.int64)

    guided = cfg != 1.0
    steps = plan_steps(group_sizes)
    weights_L = guidance_weights(cfg, cfg_schedule, L, device)
    orders_GL = orders.repeat(2, 1) if guided else orders
    context = model.embed_class(labels, B)
    if guided:
        context = torch.cat([context, model.embed_class(None, B)])
    cache = KVCache(
        config.depth,
        len(orders_GL),
        config.num_heads,
        capacity=1 + L,
        head_dim=config.embed_dim // config.num_heads,
        device=device,
        dtype=torch.get_autocast_dtype(device.type)
        if torch.is_autocast_enabled(device.type)
        else model.pos_embed.dtype,
    )
    tokens = torch.empty_like(orders)
    for step in steps:
        positions_GN = orders_GL[:, step.start : step.stop]
        rows = torch.cat([context, model.embed_queries(positions_GN)], dim=1)
        logits = model.decode_step(rows, step.num_context, cache)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, weights_L[step.start : step.stop])
        positions_BN = positions_GN[:B]
        noise = exponential_noise(seeds, positions_BN, config.vocab_size)
        codes = sample(logits, noise, temperature, top_k, top_p)
        tokens.scatter_(1, positions_BN, codes)
        context = model.embed_codes(codes.repeat(2, 1) if guided else codes, positions_GN)
    return tokens
