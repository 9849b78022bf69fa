"""Parallel decoding with a key/value cache (arXiv 2507.01957, section 3.3).

Shape legend: `B` images, `L` tokens of an image, `N` rows or tokens of a step, `V` codes; `G` = B, or 2B with guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from models.kv_cache import KVCache
from models.lpd import LPD
from models.sampling import Sampling, exponential_noise, guidance_weights, guide, noise_keys, sample
from util.errors import UserError


def check_batch(
    model: LPD,
    labels: torch.Tensor | None,
    orders: torch.Tensor,
    seeds: torch.Tensor,
    guided: bool,
    codes: torch.Tensor | None = None,
) -> None:
    """Raise UserError where a batch does not fit the model. Values are looked at, so tensors should be on the host."""
    B, L = len(orders), model.config.num_tokens
    if orders.shape != (B, L):
        raise UserError(f"orders have shape {tuple(orders.shape)}; they must be (batch, {L}).")
    wrong = (orders.sort(dim=1).values != torch.arange(L, device=orders.device)).any(dim=1).nonzero()
    if wrong.numel():
        raise UserError(f"row {int(wrong[0])} of the orders is not a permutation of 0 to {L - 1}.")
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
    if codes is not None:
        if codes.shape != (B, L):
            raise UserError(f"known codes have shape {tuple(codes.shape)}, orders {(B, L)}; they must be the same.")
        wrong = codes[(codes < 0) | (codes >= model.config.vocab_size)]
        if wrong.numel():
            raise UserError(f"code {int(wrong[0])} is out of range; the model has 0 to {model.config.vocab_size - 1}.")


def draw_codes(
    logits_GNV: torch.Tensor,
    weights_N: torch.Tensor,
    keys_BN: torch.Tensor,
    sampling: Sampling,
) -> torch.Tensor:
    """Codes (B, N) int64 of one step: guidance, then the draw, in float32 (float64 logits stay so)."""
    logits = logits_GNV if logits_GNV.dtype == torch.float64 else logits_GNV.float()
    if sampling.guided:
        conditional, unconditional = logits.chunk(2)
        logits = guide(conditional, unconditional, weights_N)
    noise = exponential_noise(keys_BN, logits.shape[-1])
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
    keys: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = noise_keys,
    codes_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """The decoding loop: codes (B, L) int64 in raster order.

    With `codes_BL` the codes at the first group's positions are known: all of them enter the cache in one pass,
    together with the second group's queries. They see the class token and each other, as a group does in training.

    All tensors are int64 and on the model's device, and right (:func:`check_batch`). Every shape follows from the group
    sizes, and nothing is read back from the device.
    """
    weights_L = guidance_weights(sampling.cfg, sampling.cfg_schedule, orders_BL.shape[1], orders_BL.device)
    cache.length = 0
    groups: list[torch.Tensor] = []
    known_BN: torch.Tensor | None = None
    sizes = list(group_sizes)
    groups_of = orders_BL.split(sizes, dim=1), weights_L.split(sizes), keys(seeds_B, orders_BL).split(sizes, dim=1)
    for targets_BQ, weights_Q, keys_BQ in zip(*groups_of, strict=True):
        if known_BN is None and codes_BL is not None:
            # The class token goes ahead alone, since it sees no code. A step needs a query, whose answer is not used.
            model.first_step(labels_B, targets_BQ[:, :1], sampling.guided, cache)
            groups.append(codes_BL.gather(1, targets_BQ))
            known_BN = targets_BQ
            continue
        if known_BN is None:
            logits_GQV = model.first_step(labels_B, targets_BQ, sampling.guided, cache)
        else:
            logits_GQV = model.next_step(groups[-1], known_BN, targets_BQ, sampling.guided, cache)
        groups.append(draw(logits_GQV, weights_Q, keys_BQ, sampling))
        known_BN = targets_BQ
    return torch.empty_like(orders_BL).scatter_(1, orders_BL, torch.cat(groups, dim=1))
