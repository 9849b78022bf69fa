"""Generation by one call: checks, cache, decoding loop; codes or pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.decoding.loop import check_batch, decode, make_cache
from models.inference import narrow_copy
from models.lpd import LPD
from models.sampling import Sampling
from tokenizers import VQModel
from util.errors import UserError
from util.pictures import to_uint8


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
    codes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Generate the codes of B images, `group_sizes[s]` of each at step s.

    A step feeds the codes of the group before (the class token at the first step) and the queries of its own group. To
    run the same schedule many times, :class:`engine.decoding.decoder.Decoder` is faster.

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
        codes: integer (B, L) in raster order, of which those of the first group are kept and all others are generated;
            None generates all.

    Returns:
        int64 (B, L) codes in raster order.

    Raises:
        UserError: for settings, labels or shapes that do not fit the model.
    """
    sampling = Sampling(cfg, cfg_schedule, temperature, top_k, top_p)
    return _generate(model, labels, orders, group_sizes, sampling, seeds, codes)


def _generate(
    model: LPD,
    labels: torch.Tensor | None,
    orders: torch.Tensor,
    group_sizes: Sequence[int],
    sampling: Sampling,
    seeds: torch.Tensor | None,
    codes: torch.Tensor | None = None,
) -> torch.Tensor:
    device = model.pos_embed.device
    sampling.check_top_k(model.config.vocab_size)
    model.check_inputs(orders, group_sizes)
    if model.training:
        raise UserError("the model is in training mode; call model.eval() before generating.")
    if seeds is None:
        seeds = torch.randint(2**62, (len(orders),))
    check_batch(model, labels, orders, seeds, sampling.guided, codes)
    codes = None if codes is None else codes.to(device, torch.int64)
    labels = None if labels is None else labels.to(device, torch.int64)
    orders, seeds = orders.to(device, torch.int64), seeds.to(device, torch.int64)
    if torch.is_autocast_enabled(device.type):
        model = narrow_copy(model, torch.get_autocast_dtype(device.type), type(model))
    cache = make_cache(model, len(orders) * (2 if sampling.guided else 1))
    return decode(model, labels, orders, seeds, group_sizes, sampling, cache, codes_BL=codes)


def generate_images(
    model: LPD,
    tokenizer: VQModel,
    labels: torch.Tensor,
    orders: torch.Tensor,
    group_sizes: Sequence[int],
    sampling: Sampling,
    seeds: torch.Tensor,
    bf16: bool = False,
) -> torch.Tensor:
    """Pictures uint8 (B, H, W, 3) instead of codes, with bfloat16 autocast where asked for; see :func:`generate`."""
    with torch.inference_mode(), torch.autocast(model.pos_embed.device.type, torch.bfloat16, enabled=bf16):
        return to_uint8(tokenizer.decode(_generate(model, labels, orders, group_sizes, sampling, seeds)))
