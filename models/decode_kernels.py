"""Triton kernels of a decoding step of few rows, where a product costs the reading of its weights.

A layer is five launches: normalised rows → queries, keys and values (the last two into the cache); attention;
projection and residual; normalised rows → hidden units with GELU; second layer of the MLP and residual. No launch is
spent on a norm: with its gains in the weights, LN(x) W + b is rstd · (x W - mean · sum(W)) + b, and mean and rstd of a
row come from partial sums that whoever wrote the row left behind.

The products into the residual stream have few outputs: they are split over their inputs as well, so that they occupy
the whole chip. The last program of a tile to arrive adds the parts, in fixed order: results do not depend on which it
was.

With `PDL` (compute capability 9.0) a launch may start while the one before writes its results, and waits for them
(programmatic dependent launch).

Shape legend: `G` sequences of `R` rows in this step (context rows, then queries), T = G·R rows in all, `H` heads of
`K` channels, `D` width, `IN` and `OUT` inputs and outputs of a product, `C` rows of the cache, `P` partial sums of a
row. Tensors of rows are (T, …), row-major; the rows of a sequence follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = tl.constexpr(1e-6)  # of every norm of the model
ROWS = tl.constexpr(64)  # of a tile: what a warpgroup's matrix instruction takes; fewer are padded
SUMS = tl.constexpr(32)  # partial sums that are read at once
NARROWEST = 16  # outputs of a tile


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait until the launch before has written everything."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _let_next_start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _tile(T, COLUMNS: tl.constexpr):
    """Outputs and rows of this program, and which rows exist."""
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    return tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), rows, rows < T


@triton.jit
def _multiply(x, weight, rows, inside, columns, IN: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Products (rows, outputs) over this program's part of the inputs."""
    inputs = tl.program_id(1) * PART + tl.arange(0, BLOCK)
    w = weight + columns[None, :] * IN + inputs[:, None]
    a = x + rows[:, None] * IN + inputs[None, :]
    product = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for _ in range(0, PART, BLOCK):
        a_tile = tl.load(a, mask=inside[:, None], other=0.0)
        product = tl.dot(a_tile, tl.load(w).to(a_tile.dtype), product, input_precision="ieee")
        w += BLOCK
        a += BLOCK
    return product


@triton.jit
def _join(product, parts, counters, SPLIT: tl.constexpr):
    """The sum of all parts of a tile, and whether this program is to use it: the last to arrive."""
    last = tl.program_id(1) >= 0
    if SPLIT > 1:
        tiles = tl.num_programs(0) * tl.num_programs(2)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        size: tl.constexpr = product.shape[0] * product.shape[1]
        within = tl.arange(0, product.shape[0])[:, None] * product.shape[1] + tl.arange(0, product.shape[1])[None, :]
        tl.store(parts + (tl.program_id(1) * tiles + tile) * size + within, product)
        tl.debug_barrier()  # all threads have stored before one of them counts
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            product = tl.zeros_like(product)
            for part in tl.static_range(SPLIT):
                product += tl.load(parts + (part * tiles + tile) * size + within, cache_modifier=".cg")
            tl.store(counters + tile, 0)
    return product, last


@triton.jit
def _scaled(product, scales, columns, SCALED: tl.constexpr):
    """The product of weights that are stored as multiples of a scale per output."""
    if SCALED:
        product *= tl.load(scales + columns)[None, :]
    return product


@triton.jit
def _moments(sums, rows, inside, stride, P: tl.constexpr):
    """Partial sums (SUMS, rows) of rows and of their squares."""
    part = tl.arange(0, SUMS)[:, None]
    where = sums + part * 2 * stride + rows[None, :]
    x = tl.load(where, mask=(part < P) & inside[None, :], other=0.0)
    xx = tl.load(where + stride, mask=(part < P) & inside[None, :], other=0.0)
    for first in tl.static_range(SUMS, P, SUMS):
        further = where + first * 2 * stride
        x += tl.load(further, mask=(first + part < P) & inside[None, :], other=0.0)
        xx += tl.load(further + stride, mask=(first + part < P) & inside[None, :], other=0.0)
    return x, xx


@triton.jit
def _normalised(product, sum_x, sum_xx, weight_sums, bias, D: tl.constexpr):
    """What the layer gives for normalised rows, from the product of the rows as they are."""
    mean = tl.sum(sum_x, 0) / D
    variance = tl.maximum(tl.sum(sum_xx, 0) / D - mean * mean, 0.0)
    centred = product - mean[:, None] * weight_sums[None, :]
    return centred * (1.0 / tl.sqrt_rn(variance + EPS))[:, None] + bias[None, :]


@triton.jit
def _embed(
    token_emb, class_emb, no_class, mask_token, pos_embed, norm_weight, norm_bias,
    context, known, targets, x, narrow, sums,
    context_stride, known_stride, target_stride, B, R, num_context, stride,
    D: tl.constexpr, D2: tl.constexpr, FIRST: tl.constexpr, LABELS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row of a step: class (first step) or code, or query, with its position, normalised."""
    _wait(PDL)
    _let_next_start(PDL)
    row = tl.program_id(0)
    sequence, i = row // R, row % R
    image = sequence % B  # the second half of the sequences, if there is one, has no class
    d = tl.arange(0, D2)
    inside = d < D
    if i < num_context:
        if FIRST:
            position = tl.zeros([], tl.int64)
            vector = no_class
            if LABELS:  # noqa: SIM102 - decided when the kernel is compiled
                if sequence < B:
                    vector = class_emb + tl.load(context + image) * D
        else:
            position = tl.load(known + image * known_stride + i) + 1
            vector = token_emb + tl.load(context + image * context_stride + i) * D
    else:
        position = tl.load(targets + image * target_stride + i - num_context) + 1
        vector = mask_token
    value = tl.load(vector + d, mask=inside, other=0.0) + tl.load(pos_embed + position * D + d, mask=inside, other=0.0)
    centred = tl.where(inside, value - tl.sum(value, 0) / D, 0.0)
    value = centred * (1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / D + EPS))
    value = value * tl.load(norm_weight + d, mask=inside, other=0.0) + tl.load(norm_bias + d, mask=inside, other=0.0)
    tl.store(x + row * D + d, value, mask=inside)
    tl.store(narrow + row * D + d, value.to(narrow.dtype.element_ty), mask=inside)
    tl.store(sums + row, tl.sum(value, 0))
    tl.store(sums + stride + row, tl.sum(value * value, 0))


@triton.jit
def _project_in(
    x, weight, scales, weight_sums, bias, sums, query, cache, T, R, stride, length, G, C,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries (T, D); keys and values of all rows into the cache, behind the `length` rows that are kept."""
    columns, rows, inside = _tile(T, COLUMNS)
    weight_sums, bias = tl.load(weight_sums + columns), tl.load(bias + columns)
    _wait(PDL)
    sum_x, sum_xx = _moments(sums, rows, inside, stride, P)
    product = _multiply(x, weight, rows, inside, columns, D, D, BLOCK)
    _let_next_start(PDL)
    product = _scaled(product, scales, columns, SCALED)
    result = _normalised(product, sum_x, sum_xx, weight_sums, bias, D).to(query.dtype.element_ty)
    kind = tl.program_id(0) * COLUMNS // D
    if kind == 0:
        tl.store(query + rows[:, None] * D + columns[None, :], result, mask=inside[:, None])
    else:
        sequences, heads, channels = (kind - 1) * G + rows // R, columns % D // K, columns % K
        head_rows = (sequences[:, None] * H + heads[None, :]).to(tl.int64) * C + (length + rows % R)[:, None]
        where = head_rows * K + channels[None, :]
        tl.store(cache + where, result, mask=inside[:, None])


@triton.jit
def _keep(
    key_value, cache, kind_stride, row_stride, R, length, G, C, H: tl.constexpr, K: tl.constexpr, D2: tl.constexpr
):
    """Keys or values of a row into the cache, behind the `length` rows that are kept."""
    row, kind, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D2)
    value = tl.load(key_value + kind * kind_stride + row.to(tl.int64) * row_stride + d, mask=d < H * K, other=0.0)
    head_row = ((kind * G + row // R) * H + d // K).to(tl.int64) * C + length + row % R
    tl.store(cache + head_row * K + d % K, value, mask=d < H * K)


@triton.jit
def _attend(
    query, cache, out, query_stride, R, num_context, length, C, scale,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attended rows (T, D). Context rows see the kept rows and each other, queries see all (paper, section 3.3)."""
    _wait(PDL)
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k, key = tl.arange(0, K), tl.arange(0, KEYS)
    row, channel = (sequence * R + i).to(tl.int64)[:, None], head * K + k[None, :]
    q = tl.load(query + row * query_stride + channel, mask=(i < R)[:, None], other=0.0)
    keys = cache + tl.program_id(0).to(tl.int64) * C * K
    values = keys + tl.num_programs(0).to(tl.int64) * C * K  # behind those of all sequences and heads
    seen = length + tl.where(i < num_context, num_context, R)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, K], tl.float32)
    for start in range(0, length + R, KEYS):
        column = start + key
        where, mask = column[:, None] * K + k[None, :], (column < length + R)[:, None]
        score = tl.dot(q, tl.trans(tl.load(keys + where, mask=mask, other=0.0)), input_precision="ieee") * scale
        score = tl.where(column[None, :] < seen[:, None], score, float("-inf"))
        now = tl.maximum(highest, tl.max(score, 1))
        p = tl.exp(score - now[:, None])
        shrink = tl.exp(highest - now)
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(values + where, mask=mask, other=0.0)
        result = result * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        highest = now
    _let_next_start(PDL)
    result = (result / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * (H * K) + channel, result, mask=(i < R)[:, None])


@triton.jit
def _add_product(
    x, weight, scales, bias, stream, narrow, sums, parts, counters, T, stride,
    IN: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add a linear layer of x (T, IN) to the residual stream (T, D), which is kept narrow as well, and its moments."""
    columns, rows, inside = _tile(T, COLUMNS)
    bias = tl.load(bias + columns)
    _wait(PDL)
    where, mask = rows[:, None] * D + columns[None, :], inside[:, None]
    residual = tl.load(stream + where, mask=mask, other=0.0)
    product = _multiply(x, weight, rows, inside, columns, IN, IN // SPLIT, BLOCK)
    _let_next_start(PDL)
    product, last = _join(product, parts, counters, SPLIT)
    if last:
        result = residual + _scaled(product, scales, columns, SCALED) + bias[None, :]
        tl.store(stream + where, result, mask=mask)
        tl.store(narrow + where, result.to(narrow.dtype.element_ty), mask=mask)
        at = sums + tl.program_id(0) * 2 * stride + rows
        tl.store(at, tl.sum(result, 1), mask=inside)
        tl.store(at + stride, tl.sum(result * result, 1), mask=inside)


@triton.jit
def _apply(
    x, weight, scales, weight_sums, bias, sums, out, T, R, taken, stride,
    D: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, GELU: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A linear layer of the normalised last `taken` of each sequence's R rows: (G · taken, OUT), which are T rows."""
    columns, rows, inside = _tile(T, COLUMNS)
    weight_sums, bias = tl.load(weight_sums + columns), tl.load(bias + columns)
    of_x = rows // taken * R + R - taken + rows % taken
    _wait(PDL)
    sum_x, sum_xx = _moments(sums, of_x, inside, stride, P)
    product = _multiply(x, weight, of_x, inside, columns, D, D, BLOCK)
    _let_next_start(PDL)
    product = _scaled(product, scales, columns, SCALED)
    result = _normalised(product, sum_x, sum_xx, weight_sums, bias, D)
    if GELU:
        result = result * 0.5 * (1.0 + tl.erf(result * 0.7071067811865476))
    where = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=inside[:, None])


@dataclass(frozen=True)
class Tile:
    """How a product is cut: outputs of a program, inputs of a turn of its loop, parts of the inputs."""

    columns: int
    block: int
    split: int = 1
    stages: int = 5


def choose_tile(inputs: int, outputs: int, rows: int, split: bool, shared_memory: int = 227 * 1024) -> Tile:
    """A tile that divides the product; which one is fastest was measured on an H200 (`scripts/tune_kernels.py`).

    Args:
        split: whether the inputs may be split.
        shared_memory: bytes that a program may have.
    """
    many_rows, many_inputs = rows > ROWS.value, inputs > 2 * outputs
    columns, parts = 32, 1
    if not split:
        # Enough programs without narrow tiles, each of which reads all rows.
        columns = 64 if many_rows or outputs > 8192 else 32
    elif many_inputs:
        columns, parts = 64 if many_rows else 32, 4
    elif not many_rows:
        parts = 2
    if outputs % columns:
        columns = 32
    while inputs % (16 * parts):
        parts //= 2
    block = next(n for n in (128, 64, 32, 16) if inputs // parts % n == 0)
    stages = min(5, inputs // parts // block + 1)
    while stages > 2 and stages * block * (columns + ROWS.value) * 2 > shared_memory:
        stages -= 1
    return Tile(columns, block, parts, stages)


@dataclass(frozen=True)
class Linear:
    """A linear layer as the kernels take it.

    Attributes:
        weight: (OUT, IN) in the dtype of narrow rows, or float8_e4m3fn.
        bias: (OUT,) float32.
        scales: (OUT,) float32, what the rows of a float8 weight are multiples of; else None.
        weight_sums: (OUT,) float32, of each row of the weight.
    """

    weight: Tensor
    bias: Tensor
    scales: Tensor | None
    weight_sums: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Linear:
        """Weights rounded to this dtype, in float8 as multiples of a scale that makes the largest of a row 448."""
        if dtype != torch.float8_e4m3fn:
            narrow = weight.to(dtype)
            return cls(narrow, bias.float(), None, narrow.float().sum(dim=1))
        scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / torch.finfo(dtype).max
        narrow = (weight.float() / scales[:, None]).to(dtype)
        return cls(narrow, bias.float(), scales, narrow.float().sum(dim=1) * scales)


class StepKernels:
    """The launches of a decoding step, and the buffers between them.

    Args:
        max_rows: rows of a step, of all sequences together.
        width, heads, hidden: of the model; multiples of 64.
        narrow: dtype of what is multiplied; the residual stream is float32.
        pdl: programmatic dependent launch; None: where the device has it.
        shared_memory: bytes that a program may have; None: what the device has.
    """

    def __init__(
        self,
        max_rows: int,
        width: int,
        heads: int,
        hidden: int,
        device: torch.device,
        narrow: torch.dtype = torch.bfloat16,
        pdl: bool | None = None,
        shared_memory: int | None = None,
    ) -> None:
        self.max_rows, self.width, self.heads = max_rows, width, heads
        self.pdl = has_pdl(device) if pdl is None else pdl
        self.shared_memory = _shared_memory(device) if shared_memory is None else shared_memory

        def rows(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(max_rows, columns, device=device, dtype=dtype)

        self.stream, self.narrow = rows(width, torch.float32), rows(width, narrow)
        self.query, self.attended, self.hidden_rows = rows(width, narrow), rows(width, narrow), rows(hidden, narrow)
        self.sums = torch.empty(width // NARROWEST, 2, max_rows, device=device)
        self._num_sums = 1
        blocks = triton.cdiv(max_rows, ROWS.value)
        self._parts = torch.empty(4 * blocks * ROWS.value * width, device=device)
        self._counters = torch.zeros(blocks * width // NARROWEST, device=device, dtype=torch.int32)

    def embed(
        self,
        model: Any,
        sequences: int,
        num_context: int,
        context: Tensor | None,
        known: Tensor | None,
        targets: Tensor,
    ) -> None:
        """Rows of a step into the residual stream.

        Args:
            model: with the parameters of :class:`models.lpd.LPD`.
            context: codes int64 (B, N); in the first step, where `known` is None, labels (B,) or None.
            known: raster indices int64 (B, N) of the codes.
            targets: raster indices int64 (B, Q) of the queries.
        """
        B, queries = targets.shape
        R, first = num_context + queries, known is None
        stand_in = targets  # for what is not there, and not read
        context_stride = 0 if context is None or first else context.stride(0)
        _embed[(sequences * R,)](
            model.token_emb.weight, model.class_emb.weight, model.fake_latent, model.mask_token, model.pos_embed,
            model.z_proj_ln.weight, model.z_proj_ln.bias,
            stand_in if context is None else context, stand_in if known is None else known, targets,
            self.stream, self.narrow, self.sums,
            context_stride, 0 if known is None else known.stride(0), targets.stride(0), B, R, num_context,
            self.max_rows, D=self.width, D2=triton.next_power_of_2(self.width),
            FIRST=first, LABELS=first and context is not None,
            PDL=self.pdl, **_options(self.pdl),
        )  # fmt: skip
        self._num_sums = 1

    def project_in(self, linear: Linear, cache: Tensor, length: int, rows: int, tile: Tile | None = None) -> None:
        """Queries of the normalised stream; keys and values of `rows` rows a sequence into `cache` (2, G, H, C, K)."""
        _, G, H, C, K = cache.shape
        tile = tile or choose_tile(self.width, 3 * self.width, G * rows, False, self.shared_memory)
        _project_in[_grid(tile, 3 * self.width, G * rows)](
            self.narrow, *_arguments(linear), linear.weight_sums, linear.bias, self.sums, self.query, cache,
            G * rows, rows, self.max_rows, length, G, C, D=self.width, H=H, K=K, P=self._num_sums,
            SCALED=linear.scales is not None, COLUMNS=tile.columns, BLOCK=tile.block, PDL=self.pdl,
            num_stages=tile.stages, **_options(self.pdl),
        )  # fmt: skip

    def attend(self, cache: Tensor, length: int, num_context: int, rows: int) -> None:
        """Attention of the queries; see :func:`attend`."""
        attend(self.query, cache, self.attended, length, num_context, rows, self.pdl)

    def add_product(self, linear: Linear, x: Tensor, rows: int, tile: Tile | None = None) -> None:
        """Add the linear layer of x, `rows` rows in all, to the stream."""
        inputs = linear.weight.shape[1]
        tile = tile or choose_tile(inputs, self.width, rows, True, self.shared_memory)
        _add_product[_grid(tile, self.width, rows)](
            x, *_arguments(linear), linear.bias, self.stream, self.narrow, self.sums, self._parts, self._counters,
            rows, self.max_rows, IN=inputs, D=self.width, SCALED=linear.scales is not None,
            COLUMNS=tile.columns, BLOCK=tile.block, SPLIT=tile.split, PDL=self.pdl,
            num_stages=tile.stages, **_options(self.pdl),
        )  # fmt: skip
        self._num_sums = self.width // tile.columns

    def apply(
        self,
        linear: Linear,
        out: Tensor,
        sequences: int,
        rows: int,
        taken: int,
        gelu: bool,
        tile: Tile | None = None,
    ) -> None:
        """The linear layer of the normalised last `taken` of the `rows` rows of each sequence into `out`."""
        outputs, T = linear.weight.shape[0], sequences * taken
        tile = tile or choose_tile(self.width, outputs, T, False, self.shared_memory)
        _apply[_grid(tile, outputs, T)](
            self.narrow, *_arguments(linear), linear.weight_sums, linear.bias, self.sums, out,
            T, rows, taken, self.max_rows, D=self.width, OUT=outputs, P=self._num_sums,
            SCALED=linear.scales is not None, GELU=gelu, COLUMNS=tile.columns, BLOCK=tile.block, PDL=self.pdl,
            num_stages=tile.stages, **_options(self.pdl),
        )  # fmt: skip


def attend(
    query: Tensor, cache: Tensor, out: Tensor, length: int, num_context: int, rows: int, pdl: bool = False
) -> None:
    """Attention of one layer of a step whose keys and values are in the cache already.

    Args:
        query: T rows of heads × channels, any stride between rows.
        cache: (2, G, H, C, K), the rows of this step behind the `length` that are kept.
        out: (T, D), attended rows.
        num_context: how many of each sequence's `rows` rows are context, which do not see the queries behind them.
    """
    _, G, H, C, K = cache.shape
    # Many sequences occupy the chip by themselves; then a larger block reads keys and values less often.
    block = 16 if G * H <= 512 else min(64, max(16, triton.next_power_of_2(rows)))
    keys = 64 if length + rows <= 64 or K > 64 else 128
    _attend[(G * H, triton.cdiv(rows, block))](
        query, cache, out, query.stride(-2), rows, num_context, length, C, K**-0.5,
        H=H, K=K, BLOCK=block, KEYS=keys, PDL=pdl, num_stages=3, **_options(pdl),
    )  # fmt: skip


def keep(key_value: Tensor, cache: Tensor, length: int) -> None:
    """Keys and values (2, G, H, R, K), of which the rows of a sequence follow each other in memory with all their
    heads, into the cache (2, G, H, C, K) behind its `length` kept rows."""
    _, G, H, R, K = key_value.shape
    _keep[(G * R, 2)](
        key_value, cache, key_value.stride(0), key_value.stride(3), R, length, G, cache.shape[3],
        H=H, K=K, D2=triton.next_power_of_2(H * K),
    )  # fmt: skip


def has_pdl(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _grid(tile: Tile, outputs: int, rows: int) -> tuple[int, int, int]:
    return outputs // tile.columns, tile.split, triton.cdiv(rows, ROWS.value)


def _arguments(linear: Linear) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias if linear.scales is None else linear.scales


def _options(pdl: bool) -> dict[str, Any]:
    return {"num_warps": 4} | ({"launch_pdl": True} if pdl else {})
