"""The training step on a GPU that is not there, from the draws to the loss: devices and dtypes, and no waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import models.mask
from engine.training.batch import codes_of, draw_samples
from engine.training.step import TrainingPass
from models.lpd import LPD, LPDConfig
from orders import published_group_sizes
from tests.helpers.fake_gpu import NoCopiesBetweenDevices, fake_gpu
from tokenizers import VQConfig, VQModel

CONFIG = LPDConfig(depth=2, embed_dim=128, num_heads=2, vocab_size=64, class_num=5)
SIZES = published_group_sizes(256, 16)[5]


@pytest.fixture(autouse=True)
def _no_kept_masks() -> Iterator[None]:
    """Those of a fake GPU are of no use afterwards."""
    kept = models.mask._kept_mask, models.mask._kept_block_mask
    for masks in kept:
        masks.cache_clear()
    yield
    for masks in kept:
        masks.cache_clear()


def zeros(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int64, device="cuda")


def same_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_mask: object) -> torch.Tensor:
    """In place of FlexAttention's kernel, which is compiled for the device."""
    assert isinstance(block_mask, models.mask.BlockMask)
    assert block_mask.kv_indices.device.type == "cuda"
    assert block_mask.shape[-2:] == (query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_from_draws_to_the_loss(monkeypatch: pytest.MonkeyPatch, attention: str, bf16: bool) -> None:
    """The masks of the schedule are there already, as they are at all steps but a run's first."""
    monkeypatch.setattr(models.mask, "_fused_flex_attention", lambda: same_shapes)
    with fake_gpu():
        with torch.device("cuda"):
            model = LPD(CONFIG).train()
        step = TrainingPass(model, attention, fused=False)
        models.mask.training_attention(SIZES, model.pos_embed.device, attention)
        with NoCopiesBetweenDevices():
            orders, flip, drop = draw_samples(0, 1, range(3), 256, 0.5, 0.1, torch.device("cuda"))
            tokens = codes_of([zeros(3, 256), zeros(3, 256)], flip, None)
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                loss = step(tokens, zeros(3), orders, drop, SIZES)
        assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
        assert loss.requires_grad


def test_codes_of_pictures() -> None:
    """Without a cache of codes the step encodes, in float32."""
    with fake_gpu():
        with torch.device("cuda"):
            tokenizer = VQModel(VQConfig(8, (1, 1, 1), res_blocks=1, codebook_size=64)).eval()
        images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8, device="cuda")
        with NoCopiesBetweenDevices(), torch.autocast("cuda", torch.bfloat16):
            codes = codes_of([images], torch.ones(2, dtype=torch.bool, device="cuda"), tokenizer)
        assert (codes.device.type, codes.dtype, codes.shape) == ("cuda", torch.int64, (2, 256))
