"""From labels to pixels on a GPU that is not there: devices and dtypes, and that nothing is waited for on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

import engine.decoding.decoder
from engine.decoding.decoder import Decoder
from models.kv_cache import KVCache
from models.lpd import LPD, LPDConfig
from models.sampling import Sampling
from orders import group_sizes
from orders.schedule import hole_group_sizes
from tests.helpers.fake_gpu import NoCopiesBetweenDevices, fake_gpu
from tokenizers import VQConfig, VQModel

CONFIG = LPDConfig(depth=2, embed_dim=128, num_heads=2, vocab_size=64, class_num=5)
TOKENIZER = VQConfig(8, (1, 1, 1, 1, 1), res_blocks=1, codebook_size=64)
SAMPLINGS = {"guided, top-k": Sampling(cfg=4.8, top_k=9), "top-p": Sampling(temperature=0.9, top_p=0.9)}


def fake_batch(size: int) -> list[torch.Tensor]:
    """Labels, orders and seeds."""
    return [torch.zeros(shape, dtype=torch.int64, device="cuda") for shape in ((size,), (size, 256), (size,))]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("path", ["plain", "compiled"])
def test_from_labels_to_pixels(monkeypatch: pytest.MonkeyPatch, path: str, bf16: bool, sampling: Sampling) -> None:
    """The pieces that are compiled run as they stand."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(engine.decoding.decoder, "check_batch", lambda *batch: None)  # looks at values, once
    drawn_from = []
    with fake_gpu():
        with torch.device("cuda"):
            model, tokenizer = LPD(CONFIG).eval(), VQModel(TOKENIZER).eval()
        decoder = Decoder(model, group_sizes(256, 20, 16), sampling, 3, tokenizer=tokenizer, path=path, bf16=bf16)
        draw = decoder._draw

        def recorded(logits_GNV: torch.Tensor, *rest: Any) -> torch.Tensor:
            drawn_from.append(logits_GNV)
            return draw(logits_GNV, *rest)

        monkeypatch.setattr(decoder, "_draw", recorded)
        with NoCopiesBetweenDevices():
            codes, images = decoder(*fake_batch(3))
        assert images is not None
        assert codes.device.type == images.device.type == "cuda"
        assert (codes.dtype, codes.shape) == (torch.int64, (3, 256))
        assert (images.dtype, images.shape) == (torch.uint8, (3, 256, 256, 3))
        assert decoder.cache.key_values.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert {logits.dtype for logits in drawn_from} == {torch.float32}
        rows = 6 if sampling.guided else 3
        assert [tuple(logits.shape) for logits in drawn_from] == [(rows, n, 64) for n in group_sizes(256, 20, 16)]


@pytest.mark.parametrize("path", ["plain", "compiled"])
def test_known_codes_enter_the_cache_without_waiting(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """100 known codes in one pass, behind the class token."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(engine.decoding.decoder, "check_batch", lambda *batch: None)
    sizes = (100, *hole_group_sizes(16, 20, 156))
    kept: list[int] = []
    commit = KVCache.commit

    def recorded(cache: KVCache, rows: int) -> None:
        kept.append(rows)
        commit(cache, rows)

    monkeypatch.setattr(KVCache, "commit", recorded)
    with fake_gpu():
        with torch.device("cuda"):
            model = LPD(CONFIG).eval()
        decoder = Decoder(model, sizes, Sampling(cfg=4.8), 3, path=path, bf16=True, with_known=True)
        kept.clear()
        with NoCopiesBetweenDevices():
            labels, orders, seeds = fake_batch(3)
            codes = decoder(labels, orders, seeds, orders).codes
        assert (codes.device.type, codes.dtype, codes.shape) == ("cuda", torch.int64, (3, 256))
        assert kept == [1, *sizes[:-1]]


def test_what_would_wait_is_seen() -> None:
    """A value that is read, a copy from the host and a mix of devices."""
    with fake_gpu():
        codes = fake_batch(3)[1]
        with pytest.raises(DataDependentOutputException):
            codes.sum().item()
        with pytest.raises(AssertionError, match="copies between"), NoCopiesBetweenDevices():
            torch.arange(256).to("cuda")
        with pytest.raises(AssertionError, match="copies between"), NoCopiesBetweenDevices():
            codes.cpu()
        with pytest.raises(RuntimeError, match="different devices"):
            codes + torch.arange(256)
