"""The network against vectors made with the published implementation, its parameter names, and its masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.generate import generate
from models import MODEL_SIZES, build_model, model_config
from models.kv_cache import KVCache
from models.lpd import LPD, LPDConfig, resize_pos_embed
from tests.helpers.commands import DATA
from tests.helpers.reference_weights import reference_state_dict
from tests.helpers.visibility import brute_force_visibility
from util.errors import UserError


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(DATA / "lpd_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def reference_model(reference: dict[str, np.ndarray]) -> LPD:
    config = json.loads(str(reference["config"]))
    seed = config.pop("weights_seed")
    model = LPD(LPDConfig(**config)).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(reference_state_dict(shapes, seed))
    return model


def test_training_pass_equals_reference(reference: dict[str, np.ndarray], reference_model: LPD) -> None:
    """Logits within 1e-5, the tolerance that tells a wrong LayerNorm eps, a swapped qkv or a wrong mask."""
    tokens, labels, orders = (torch.from_numpy(reference[name]) for name in ("tokens", "labels", "orders"))
    with torch.no_grad():
        logits = reference_model(tokens, labels, orders, reference["group_sizes"].tolist())
    torch.testing.assert_close(logits, torch.from_numpy(reference["logits"]), atol=1e-5, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, orders).flatten())
    assert loss.item() == pytest.approx(float(reference["loss"]), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("greedy_cfg1.0_linear", {}),
        ("greedy_cfg3.0_linear", {"cfg": 3.0}),
        ("greedy_cfg3.0_constant", {"cfg": 3.0, "cfg_schedule": "constant"}),
    ],
)
def test_greedy_decode_equals_reference(
    reference: dict[str, np.ndarray], reference_model: LPD, name: str, options: dict
) -> None:
    """Codes of the cached decode, exactly: guidance weights, raster scatter and cache rows all show here."""
    labels, orders = torch.from_numpy(reference["labels"]), torch.from_numpy(reference["orders"])
    tokens = generate(reference_model, labels, orders, reference["group_sizes"].tolist(), top_k=1, **options)
    assert torch.equal(tokens, torch.from_numpy(reference[name]))


def test_greedy_unconditional_decode_equals_reference(reference: dict[str, np.ndarray], reference_model: LPD) -> None:
    tokens = generate(
        reference_model, None, torch.from_numpy(reference["orders"]), reference["group_sizes"].tolist(), top_k=1
    )
    assert torch.equal(tokens, torch.from_numpy(reference["greedy_uncond"]))


def test_parameter_names_and_shapes_of_the_released_model() -> None:
    """A renamed or transposed parameter would make the released checkpoints unloadable."""
    with torch.device("meta"):
        model = build_model("lpd_l")
    expected = json.loads((DATA / "lpd_l_256.keys.json").read_text())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(("name", "millions"), [("lpd_l", 337), ("lpd_xl", 752), ("lpd_xxl", 1410)])
def test_released_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("group_sizes", [[1], [1, 3], [1, 2, 3, 4, 6], [3, 1, 2]])
def test_cached_attention_is_a_slice_of_the_training_mask(group_sizes: list[int]) -> None:
    """Step s restricted to the rows it feeds must be what training taught the model; query keys must not survive."""
    table = brute_force_visibility(group_sizes)
    num_rows, num_context_rows = len(table), sum(group_sizes)
    query, key, value = torch.randn(3, 2, 3, 4, num_rows, 5, dtype=torch.float64)  # (layers, B, H, rows, K)
    key_value = torch.stack([key, value])
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=table)
    cache = KVCache(2, 3, 4, 1 + sum(group_sizes), 5, torch.device("cpu"), torch.float64)
    cached, context, first_query = 0, 1, 0
    for size in group_sizes:
        queries = num_context_rows + torch.arange(first_query, first_query + size)
        rows = torch.cat([torch.arange(cached, cached + context), queries])
        first, last = (cache.attend(i, context, query[i][:, :, rows], key_value[:, i, :, :, rows]) for i in range(2))
        cache.commit(context)
        torch.testing.assert_close(first, expected[0][:, :, rows])
        torch.testing.assert_close(last, expected[1][:, :, queries])  # nobody reads context rows of the last layer
        cached, context, first_query = cached + context, size, first_query + size


def test_label_drop_only_in_training_mode() -> None:
    model = build_model("lpd_debug", img_size=32, class_num=3, vocab_size=5, label_drop_prob=1.0).double()
    tokens, labels, orders = torch.randint(5, (2, 4)), torch.tensor([0, 2]), torch.arange(4).repeat(2, 1)
    no_class = model.eval()(tokens, None, orders, [1, 3])
    assert not torch.allclose(model(tokens, labels, orders, [1, 3]), no_class)
    torch.testing.assert_close(model.train()(tokens, labels, orders, [1, 3]), no_class)
    kept = model(tokens, labels, orders, [1, 3], label_drop_B=torch.tensor([True, False]))
    torch.testing.assert_close(kept[0], no_class[0])
    assert not torch.allclose(kept[1], no_class[1])


def test_attn_dropout_acts_when_asked_for_and_only_in_training() -> None:
    model = build_model("lpd_debug", img_size=32, class_num=3, vocab_size=5, attn_dropout=0.5, label_drop_prob=0.0)
    inputs = (torch.randint(5, (2, 4)), torch.tensor([0, 2]), torch.arange(4).repeat(2, 1), [1, 3])
    assert not torch.equal(model.train()(*inputs), model(*inputs))
    assert torch.equal(model.eval()(*inputs), model(*inputs))


def test_grad_checkpointing_gives_the_same_gradients() -> None:
    inputs = (torch.randint(5, (2, 16)), torch.tensor([0, 2]), torch.arange(16).repeat(2, 1), [1, 3, 12])
    gradients = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        options = {"img_size": 64, "class_num": 3, "vocab_size": 5, "proj_dropout": 0.1}
        model = build_model("lpd_debug", grad_checkpointing=grad_checkpointing, **options).double()
        model(*inputs).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_pos_embed_resize_keeps_slot_zero_and_constant_grids() -> None:
    pos = torch.full((1, 17, 3), 2.0)
    pos[:, 0] = 7.0
    resized = resize_pos_embed(pos, 64)
    assert resized.shape == (1, 65, 3)
    assert torch.equal(resized[:, 0], pos[:, 0])
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 64, 3), 2.0))
    assert resize_pos_embed(pos, 16) is pos


def test_pos_embed_resize_keeps_rows_and_columns_apart() -> None:
    """A transposed grid would pass a constant test: use values that grow with the row only."""
    rows = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    resized = resize_pos_embed(torch.cat([torch.zeros(1, 1, 1), rows], dim=1), 64)[0, 1:, 0].view(8, 8)
    assert (resized.diff(dim=0) > 0).all()
    torch.testing.assert_close(resized, resized[:, :1].expand(8, 8))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"img_size": 250}, "250"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"depth": 0}, "depth"),
        ({"label_drop_prob": 1.5}, "1.5"),
        ({"class_num": -1}, "class_num"),
    ],
)
def test_bad_config_is_refused_by_name(overrides: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        model_config("lpd_l", **overrides)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=next(iter(MODEL_SIZES))):
        build_model("lpd_huge")
