"""The tokenizer network: published names, published numbers, other sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.commands import DATA
from tests.helpers.reference_weights import reference_state_dict
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import VQConfig, VQModel
from tokenizers import vq_model as vq_module
from util.errors import UserError

TINY = VQConfig(base_width=8, multipliers=(1, 1, 1), res_blocks=1, z_channels=8, codebook_size=32, code_dim=4)


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    return json.loads((DATA / "vq_ds16_c2i.keys.json").read_text())


@pytest.fixture(scope="module")
def reference(shapes: dict[str, list[int]]) -> tuple[VQModel, dict[str, np.ndarray]]:
    with np.load(DATA / "vq_64.npz") as file:
        vectors = dict(file)
    with torch.device("meta"):
        model = VQModel()
    model.load_state_dict(reference_state_dict(shapes, int(vectors["weights_seed"])), assign=True)
    return model.eval().requires_grad_(False), vectors


def test_state_dict_has_the_published_names_and_shapes(shapes: dict[str, list[int]]) -> None:
    """Guards against a renamed, missing, extra or reordered level: the released file would no longer load."""
    with torch.device("meta"):
        state = VQModel().state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == shapes
    assert "quantize.codebook_used" not in dict(VQModel(TINY).named_parameters())


def test_encode_matches_the_published_implementation(reference: tuple[VQModel, dict[str, np.ndarray]]) -> None:
    """Guards against wrong padding, norm, attention scale or nearest-entry rule in the encoder."""
    model, vectors = reference
    indices = model.encode(torch.from_numpy(vectors["image"]))
    assert indices.dtype == torch.int64
    assert indices.tolist() == vectors["indices"].tolist()


def test_decode_matches_the_published_implementation(reference: tuple[VQModel, dict[str, np.ndarray]]) -> None:
    """Guards against an unnormalised codebook entry, a wrong upsampling or a hidden final activation."""
    model, vectors = reference
    decoded = model.decode(torch.from_numpy(vectors["codes"]))
    torch.testing.assert_close(decoded, torch.from_numpy(vectors["decoded"]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("multipliers", [(2,), (1, 2), (1, 1, 2), (1, 2, 2, 3), (1, 1, 2, 2, 4)])
def test_every_stride_makes_the_right_grid_and_comes_back(multipliers: tuple[int, ...]) -> None:
    """Guards against strides other than 16 whose halves disagree in size."""
    model = VQModel(replace(TINY, multipliers=multipliers)).eval()
    stride = 2 ** (len(multipliers) - 1)
    assert model.stride == model.config.stride == stride
    indices = model.encode(torch.rand(2, 3, 3 * stride, 3 * stride) * 2 - 1)
    assert indices.shape == (2, 9)
    assert model.decode(indices).shape == (2, 3, 3 * stride, 3 * stride)


def test_small_sizes_follow_the_released_plan() -> None:
    """Guards against block counts tied to the released size: one residual block more in the decoder, attention only at
    the coarsest level, no resampling after the last one."""
    names = VQModel(replace(TINY, multipliers=(1, 2))).state_dict().keys()
    units = {".".join(name.split(".")[:5]).removesuffix(".conv") for name in names if ".conv_blocks." in name}
    assert sorted(units) == [
        "decoder.conv_blocks.0.attn.0",
        "decoder.conv_blocks.0.attn.1",
        "decoder.conv_blocks.0.res.0",
        "decoder.conv_blocks.0.res.1",
        "decoder.conv_blocks.0.upsample",
        "decoder.conv_blocks.1.res.0",
        "decoder.conv_blocks.1.res.1",
        "encoder.conv_blocks.0.downsample",
        "encoder.conv_blocks.0.res.0",
        "encoder.conv_blocks.1.attn.0",
        "encoder.conv_blocks.1.res.0",
    ]


def test_raster_order() -> None:
    """Guards against a transposed grid: another code at the end of the first row changes the top right corner most."""
    model = VQModel(replace(TINY, multipliers=(1, 1)))
    codes = torch.zeros(2, 16, dtype=torch.int64)
    codes[1, 3] = 1  # first row, last column
    with torch.no_grad():
        first, second = model.decode(codes)
    change = (first - second).abs().sum(0)
    assert change[:2, -2:].mean() > change[-2:, :2].mean()


def test_nearest_entry_is_the_brute_force_one_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a search whose pieces are put together wrongly, or that forgets to normalise the entries."""
    monkeypatch.setattr(vq_module, "_MAX_SCORES", 100)
    model = VQModel(TINY).double()
    with torch.no_grad():
        model.quantize.embedding.weight *= torch.rand(32, 1) * 10
    features = torch.nn.functional.normalize(torch.randn(3, 7, 4, dtype=torch.float64), dim=-1)
    entries = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=-1)
    assert torch.equal(model.quantize.nearest(features), torch.cdist(features, entries.expand(3, -1, -1)).argmin(-1))


def test_lookup_returns_what_nearest_finds() -> None:
    model = VQModel(TINY)
    indices = torch.arange(32).view(2, 16)
    assert torch.equal(model.quantize.nearest(model.quantize.lookup(indices)), indices)


def test_codes_are_those_of_float32_under_autocast() -> None:
    """Guards against a search in bfloat16, which mixes up neighbouring entries."""
    codebook = VQModel(replace(TINY, codebook_size=4096)).quantize
    features = codebook.lookup(torch.arange(4096))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.nearest(features), torch.arange(4096))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_width": 0}, "base_width 0"),
        ({"base_width": 6}, "multiple of 4"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"codebook_size": 2.5}, "codebook_size 2.5"),
        ({"code_dim": -1}, "code_dim -1"),
        ({"res_blocks": True}, "res_blocks True"),
    ],
)
def test_impossible_configs_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VQConfig(**values)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 30, 30),
        torch.zeros(1, 3, 32, 64),
        torch.zeros(1, 1, 32, 32),
        torch.zeros(3, 32, 32),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_images_of_a_wrong_shape_or_type_are_refused(images: torch.Tensor) -> None:
    """2×8 tokens would otherwise be decoded as a 4×4 grid."""
    with pytest.raises(UserError, match=r"[Ii]mages"):
        VQModel(TINY).encode(images)


@pytest.mark.parametrize("indices", [torch.zeros(1, 15, dtype=torch.int64), torch.zeros(16).long(), torch.zeros(1, 16)])
def test_indices_of_a_wrong_shape_or_type_are_refused(indices: torch.Tensor) -> None:
    with pytest.raises(UserError, match="indices"):
        VQModel(TINY).decode(indices)


def test_any_grid_of_codes_is_decoded() -> None:
    """Rows and columns as they are: a square as two dimensions or one, and a wide one, transposed a high one."""
    tokenizer = tiny_tokenizer()
    codes = torch.randint(12, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert tokenizer.decode(codes).shape == (2, 3, 12, 20)
        assert torch.equal(tokenizer.decode(codes[:, :, :3]), tokenizer.decode(codes[:, :, :3].flatten(1)))
        for conv in (module for module in tokenizer.modules() if isinstance(module, torch.nn.Conv2d)):
            conv.weight.copy_((conv.weight + conv.weight.transpose(2, 3)) / 2)
        torch.testing.assert_close(tokenizer.decode(codes.mT).mT, tokenizer.decode(codes))
