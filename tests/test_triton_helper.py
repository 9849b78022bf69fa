"""The helper for Triton kernels: what the interpreter computes is what torch computes, and spills are seen."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.helpers.triton_kernels import SHARED_MEMORY, compiled, interpreted


@triton.jit
def _scaled(x: tl.tensor, factor: int) -> tl.tensor:
    return x * factor


@triton.jit
def _multiply(
    x: tl.tensor,
    w: tl.tensor,
    out: tl.tensor,
    largest: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Rows times w, doubled, plus the first N columns of the rows; and where each result is largest."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    k, n = tl.arange(0, K), tl.arange(0, N)
    inside = (row < rows)[:, None]
    total = tl.zeros([16, N], tl.float32)
    for start in range(0, K, 16):
        part = start + tl.arange(0, 16)
        left = tl.load(x + row[:, None] * K + part[None, :], mask=inside, other=0.0)
        total += tl.dot(left, tl.load(w + part[:, None] * N + n[None, :]), input_precision="ieee")
    whole = tl.load(x + row[:, None] * K + k[None, :], mask=inside, other=0.0)
    norm = tl.sum(whole.to(tl.float32), 1)
    added = tl.load(x + row[:, None] * K + n[None, :], mask=inside, other=0.0)
    result = _scaled(total, 2).to(x.dtype.element_ty) + added * added
    tl.store(out + row[:, None] * N + n[None, :], result, mask=inside)
    tl.store(largest + row, tl.argmax(total + norm[:, None], 1), mask=row < rows)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def _launch(x: torch.Tensor, w: torch.Tensor, pdl: bool = False, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, K), N = x.shape, w.shape[1]
    out, largest = x.new_empty(rows, N), torch.empty(rows, dtype=torch.int32, device=x.device)
    _multiply[triton.cdiv(rows, 16),](x, w, out, largest, rows, K, N, pdl, launch_pdl=pdl, **options)
    return out, largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_interpreter_computes_what_torch_does(dtype: torch.dtype) -> None:
    x, w = torch.randn(37, 64).to(dtype), torch.randn(64, 32).to(dtype)
    product = x.float() @ w.float()
    with interpreted():
        out, largest = _launch(x, w, pdl=True)
    # Sums in another order may round to a neighbour.
    torch.testing.assert_close(out, (2 * product).to(dtype) + x[:, :32] * x[:, :32])
    assert torch.equal(largest.long(), product.argmax(dim=1))


def test_bfloat16_is_rounded_to_nearest_even_after_each_operation() -> None:
    x = torch.randn(32, 16).bfloat16()
    with interpreted():
        out, _ = _launch(x, torch.zeros(16, 16).bfloat16())
    assert torch.equal(out, x * x)
    assert not torch.equal(out.float(), x.float() * x.float())  # something was rounded


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_are_compiled_for_a_gpu_that_is_not_there(capability: int) -> None:
    x, w = torch.empty(37, 64, device="meta"), torch.empty(64, 32, device="meta")
    with interpreted():
        _launch(torch.zeros(16, 16), torch.zeros(16, 16))  # leaves nothing behind that the compiler trips over
    with compiled(capability) as kernels:
        _launch(x.bfloat16(), w.bfloat16(), pdl=capability >= 90, num_warps=2)
        _launch(x, w, maxnreg=24)
    fine, starved = kernels
    assert (fine.name, fine.grid, fine.warps) == ("_multiply", (3,), 2)
    assert ("griddepcontrol" in fine.ptx) == (capability >= 90)
    assert 0 < fine.shared <= SHARED_MEMORY[capability]
    assert 0 < fine.registers <= 255
    assert fine.spilled == 0
    assert starved.registers <= 24
    assert starved.spilled > 0
