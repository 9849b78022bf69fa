"""Own kernels: equal to the model's plain step on random shapes, in Triton's interpreter; compiled without spills."""

from __future__ import annotations

from typing import cast

import pytest
import torch

pytest.importorskip("triton")
from models.block import Block
from models.decode_kernels import Linear, StepKernels, Tile, choose_tile, keep
from models.kv_cache import KVCache
from models.lpd import LPD, LPDConfig
from tests.helpers.tiny_models import far_from_initialisation
from tests.helpers.triton_kernels import SHARED_MEMORY, compiled, interpreted

CPU = torch.device("cpu")


def random_model(width: int, heads: int, depth: int = 2, vocab_size: int = 96) -> LPD:
    config = LPDConfig(
        img_size=128, embed_dim=width, depth=depth, num_heads=heads, vocab_size=vocab_size, class_num=5, mlp_ratio=2
    )
    return far_from_initialisation(LPD(config).eval(), 0.2)


def empty_cache(model: LPD, sequences: int) -> KVCache:
    """What is not written yet is not a number, so that reading it shows."""
    config = model.config
    head_dim = config.embed_dim // config.num_heads
    cache = KVCache(config.depth, sequences, config.num_heads, config.num_tokens + 1, head_dim, CPU, torch.float32)
    cache.key_values.fill_(torch.nan)
    return cache


def taken_in(linear: torch.nn.Linear, norm: torch.nn.LayerNorm | None = None) -> Linear:
    weight = linear.weight.detach()
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    if norm is not None:
        weight, bias = weight * norm.weight, bias + weight @ norm.bias
    return Linear.of(weight, bias, torch.float32)


@pytest.mark.parametrize(
    ("width", "heads", "images", "guided", "sizes", "tiles"),
    [
        (64, 2, 2, True, [1, 2, 7, 12], (None, None)),
        (128, 8, 3, True, [1, 12, 14], (Tile(16, 32), Tile(32, 32, 4, 2))),  # more rows than one tile has
        (96, 3, 1, False, [2, 3, 40], (Tile(32, 32), Tile(16, 16, 2))),  # kept rows and queries over two blocks of keys
        (576, 9, 1, False, [3, 4], (Tile(64, 64), Tile(16, 64))),  # 36 partial sums, more than are read at once
    ],
)
@torch.no_grad()
def test_steps_are_those_of_the_plain_model(
    width: int, heads: int, images: int, guided: bool, sizes: list[int], tiles: tuple[Tile | None, Tile | None]
) -> None:
    """Embeddings, every layer's residual stream, cached keys and values, logits: float32, up to rounding."""
    model = random_model(width, heads, depth=1 if width > 200 else 2)
    G = 2 * images if guided else images
    plain, own = empty_cache(model, G), empty_cache(model, G)
    kernels = StepKernels(G * 64, width, heads, 2 * width, CPU, torch.float32)
    for tensor in (kernels.stream, kernels.narrow, kernels.query, kernels.attended, kernels.hidden_rows, kernels.sums):
        tensor.fill_(torch.nan)
    orders = torch.stack([torch.randperm(64) for _ in range(images)])
    labels, known = torch.randint(5, (images,)), None
    apply_tile, add_tile = tiles
    for targets in orders.split([*sizes, 64 - sum(sizes)], dim=1)[: len(sizes)]:
        queries = targets.shape[1]
        if known is None:
            num_context, codes = 1, None
            classes = [model.embed_class(x, images) for x in ((labels, None) if guided else (labels,))]
            rows = torch.cat([torch.cat(classes), model.embed_queries(targets).repeat(len(classes), 1, 1)], dim=1)
        else:
            num_context, codes = known.shape[1], torch.randint(96, known.shape)
            rows = model.embed_step(codes, known, targets, guided)
        R = num_context + queries
        expected = model.decode_step(rows, num_context, plain)
        with interpreted():
            kernels.embed(model, G, num_context, labels if codes is None else codes, known, targets)
            torch.testing.assert_close(kernels.stream[: G * R].view(G, R, width), rows, atol=1e-5, rtol=1e-5)
            for layer, module in enumerate(model.blocks):
                block, kept = cast(Block, module), own.key_values[layer]
                kernels.project_in(taken_in(block.attn.qkv, block.norm1), kept, own.length, R, apply_tile)
                kernels.attend(kept, own.length, num_context, R)
                kernels.add_product(taken_in(block.attn.proj), kernels.attended, G * R, add_tile)
                fc1 = taken_in(block.mlp.fc1, block.norm2)
                kernels.apply(fc1, kernels.hidden_rows, G, R, R, True, apply_tile)
                kernels.add_product(taken_in(block.mlp.fc2), kernels.hidden_rows, G * R, add_tile)
            logits = torch.full((G, queries, 96), torch.nan)
            kernels.apply(taken_in(model.head, model.norm), logits, G, R, queries, False)
        own.commit(num_context)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
        filled = slice(0, plain.length)
        torch.testing.assert_close(
            own.key_values[..., filled, :], plain.key_values[..., filled, :], atol=1e-4, rtol=1e-4
        )
        assert not kernels._counters.any()  # ready for the next launch
        known = targets


@torch.no_grad()
def test_float8_weights_are_multiples_of_a_scale_per_output() -> None:
    """A row of zeros, one of large and one of small weights: each is exact to float8's own rounding, 2^-4."""
    weight = torch.randn(32, 64) * torch.logspace(-4, 3, 32)[:, None]
    weight[3] = 0
    linear = Linear.of(weight, torch.zeros(32), torch.float8_e4m3fn)
    assert linear.scales is not None
    restored = linear.weight.float() * linear.scales[:, None]
    assert ((restored - weight).abs() <= weight.abs() * 2**-4 + weight.abs().amax(1, keepdim=True) * 2**-9).all()
    torch.testing.assert_close(linear.weight_sums, restored.sum(dim=1))


def launch_everything(
    kernels: StepKernels, sequences: int, length: int, rows: int, dtype: torch.dtype, vocab_size: int = 16384
) -> None:
    """One layer and the head of a published model with 256 px, on tensors without values."""
    D, heads = kernels.width, kernels.heads
    with torch.device("meta"):
        model = LPD(LPDConfig(embed_dim=D, num_heads=heads, depth=1))
        images = max(1, sequences // 2)
        codes = torch.empty(images, rows // 2, dtype=torch.int64)
        cache = torch.empty(2, sequences, heads, 257, 64, dtype=torch.bfloat16)
        qkv_rows = torch.empty(sequences, rows, 3, heads, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
        logits = torch.empty(sequences, rows // 2, vocab_size)
        shapes = ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (vocab_size, D))
        linears = [Linear.of(torch.empty(o, i), torch.empty(o), dtype) for o, i in shapes]
    qkv, proj, fc1, fc2, head = linears
    kernels.embed(model, sequences, rows - rows // 2, codes, codes, codes)
    kernels.project_in(qkv, cache, length, rows)
    keep(qkv_rows[1:], cache, length)
    kernels.attend(cache, length, rows // 2, rows)
    kernels.add_product(proj, kernels.attended, sequences * rows)
    kernels.apply(fc1, kernels.hidden_rows, sequences, rows, rows, True)
    kernels.add_product(fc2, kernels.hidden_rows, sequences * rows)
    kernels.apply(head, logits, sequences, rows, rows // 2, False)


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "sequences", "length", "rows"),
    [
        (80, 1024, torch.bfloat16, 2, 0, 10),
        (80, 1536, torch.bfloat16, 2, 100, 40),  # two tiles of rows, larger blocks of keys
        (86, 1024, torch.bfloat16, 2, 100, 40),
        (89, 1024, torch.float8_e4m3fn, 2, 0, 10),
        (90, 1024, torch.bfloat16, 2, 0, 10),
        (90, 1024, torch.bfloat16, 1, 0, 2),  # one image without guidance: Triton takes ones for constants
        (90, 1280, torch.bfloat16, 2, 100, 40),
        (90, 1024, torch.bfloat16, 128, 100, 40),  # larger blocks of rows
        (90, 1024, torch.float8_e4m3fn, 2, 100, 40),
    ],
)
@pytest.mark.slow
def test_kernels_fit_the_device(
    capability: int, width: int, dtype: torch.dtype, sequences: int, length: int, rows: int
) -> None:
    """Of published models: within the shared memory of the device, and no register spills."""
    shared_memory = SHARED_MEMORY[capability]
    kernels = StepKernels(
        sequences * rows, width, width // 64, 4 * width, torch.device("meta"),
        pdl=capability >= 90, shared_memory=shared_memory,
    )  # fmt: skip
    with compiled(capability) as found:
        launch_everything(kernels, sequences, length, rows, dtype)
    assert len({kernel.name for kernel in found}) == 6
    for kernel in found:
        assert kernel.shared <= shared_memory, kernel
        assert kernel.spilled == 0, kernel
        assert ("griddepcontrol" in kernel.ptx) == (capability >= 90 and kernel.name != "_keep")


@pytest.mark.parametrize("width", [1024, 1280, 1536])
@pytest.mark.parametrize("rows", [4, 64, 65, 128])
@pytest.mark.parametrize("shared_memory", SHARED_MEMORY.values())
def test_tiles_divide_the_published_models(width: int, rows: int, shared_memory: int) -> None:
    for inputs, outputs, split in (
        (width, 3 * width, False),
        (width, width, True),
        (width, 4 * width, False),
        (4 * width, width, True),
        (width, 16384, False),
    ):
        tile = choose_tile(inputs, outputs, rows, split, shared_memory)
        assert outputs % tile.columns == 0
        assert inputs % (tile.split * tile.block) == 0
        assert tile.split == 1 or split
        assert tile.stages * tile.block * (tile.columns + 64) * 2 <= shared_memory
