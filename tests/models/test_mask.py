"""Training masks against the visibility table, and FlexAttention against the dense mask, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention

from models import build_model
from models.lpd import LPD
from models.mask import training_attention, training_block_mask, training_mask
from orders import published_group_sizes
from tests.helpers.visibility import brute_force_visibility


@pytest.mark.parametrize("group_sizes", [[1], [4], [1, 3], [1, 1, 1, 1], [1, 2, 3, 4, 6], [3, 1, 2]])
def test_training_mask_is_the_visibility_table(group_sizes: list[int]) -> None:
    assert torch.equal(training_mask(group_sizes), brute_force_visibility(group_sizes))


def test_making_a_mask_reads_nothing_back() -> None:
    """Fake tensors have no values: a size that follows from some would fail, as it would wait on a GPU."""
    with FakeTensorMode():
        assert training_mask([1, 3, 5, 7]).shape == (32, 32)


def test_codes_of_the_last_group_are_seen_by_themselves_only() -> None:
    mask = training_mask([1, 2, 5])
    assert mask[:, 4:8].nonzero()[:, 0].unique().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("group_sizes", [[1, 3, 12], [1] * 16, [16]])
@pytest.mark.parametrize("num_rows", [32, 16])
def test_block_mask_rule_is_the_dense_mask(group_sizes: list[int], num_rows: int) -> None:
    """The rule that FlexAttention evaluates in the kernel, also for the last block's queries alone."""
    rule = training_block_mask(group_sizes, num_rows).mask_mod
    rows, columns = torch.arange(num_rows)[:, None], torch.arange(32)
    assert torch.equal(rule(rows, rows, rows, columns), training_mask(group_sizes)[-num_rows:])


@pytest.mark.parametrize("group_sizes", [*published_group_sizes(256), *published_group_sizes(512)], ids=len)
def test_blocks_that_are_skipped_or_taken_whole(group_sizes: tuple[int, ...]) -> None:
    """A wrongly skipped block would lose visible rows, a wrongly whole one would show the future."""
    dense = training_mask(group_sizes)
    for num_rows in (len(dense), len(dense) // 2):
        mask = training_block_mask(group_sizes, num_rows)
        assert mask.full_kv_num_blocks is not None
        assert mask.full_kv_indices is not None
        tiles = dense[-num_rows:].unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
        whole = tiles.all(dim=-1).all(dim=-1)
        assert torch.equal(named_blocks(mask.full_kv_num_blocks, mask.full_kv_indices), whole)
        assert torch.equal(named_blocks(mask.kv_num_blocks, mask.kv_indices), tiles.any(dim=-1).any(dim=-1) & ~whole)


def named_blocks(counts_11N: torch.Tensor, indices_11NM: torch.Tensor) -> torch.Tensor:
    """bool (N, M): which of its M blocks each of N rows of blocks names."""
    blocks = torch.zeros(indices_11NM.shape[2:], dtype=torch.bool)
    for row, count in enumerate(counts_11N[0, 0].tolist()):
        blocks[row, indices_11NM[0, 0, row, :count].long()] = True
    return blocks


def features_and_gradients(
    model: LPD, group_sizes: tuple[int, ...], attention: str, batch: int = 2
) -> list[torch.Tensor]:
    device, config = model.pos_embed.device, model.config
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch, config.num_tokens), generator=generator)
    orders = torch.rand(tokens.shape, generator=generator).argsort(dim=1)
    labels = torch.randint(config.class_num, (batch,), generator=generator)
    model.zero_grad()
    tokens, labels, orders = tokens.to(device), labels.to(device), orders.to(device)
    features = model.features(tokens, labels, orders, group_sizes, attention=attention)
    (features * torch.randn(features.shape, generator=generator).to(features)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [features.detach(), *(g for g in gradients.values() if g is not None)]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flex_attention_equals_the_dense_mask(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Outputs and all gradients. On a CPU torch refuses the backward pass, which its plain implementation has."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    model = build_model("lpd_debug", img_size=64, class_num=3, vocab_size=11, label_drop_prob=0.0).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for group_sizes in ((1, 3, 5, 7), (2, 14)):
        dense, flex = (features_and_gradients(model, group_sizes, kind) for kind in ("sdpa", "flex"))
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(flex, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_flex_attention_equals_the_dense_mask_on_a_gpu() -> None:
    model = build_model("lpd_debug", class_num=3, vocab_size=11, label_drop_prob=0.0).cuda()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for group_sizes in published_group_sizes(256, 16)[::4]:
        dense, flex = (features_and_gradients(model, group_sizes, kind) for kind in ("sdpa", "flex"))
        torch.testing.assert_close(flex, dense, rtol=1e-3, atol=1e-3)


def test_masks_are_made_once_and_fit_training_after_inference() -> None:
    """A mask made in inference mode and kept would break the backward pass of a later step."""
    model = build_model("lpd_debug", img_size=64, class_num=3, vocab_size=11)
    with torch.inference_mode():
        model(torch.zeros(1, 16, dtype=torch.int64), None, torch.arange(16)[None], (4, 5, 7))
    features_and_gradients(model, (4, 5, 7), "sdpa")
    first, second = (training_attention((4, 5, 7), torch.device("cpu"))[0] for _ in range(2))
    assert first.args[0] is second.args[0]  # type: ignore[attr-defined]
