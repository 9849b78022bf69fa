"""Triton kernels without a GPU: run by Triton's interpreter, or compiled for a GPU that is not there.

Both act on every launch in a `with` block, whatever module the kernel is in, so that the functions around the kernels
are under test too, with the blocks, warps and stages that they choose:

    with interpreted():
        result = attend(qkv, cache)  # on CPU tensors
    with compiled(90) as kernels:
        attend(qkv, cache)  # kernels are compiled, not run; tensors may be on the meta device
    assert all(kernel.spilled == 0 and kernel.shared <= SHARED_MEMORY[90] for kernel in kernels)
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, make_backend
from triton.runtime import interpreter, jit

# Shared memory in bytes that one thread block may have, by compute capability (CUDA C programming guide, table of
# technical specifications).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Launches run in Triton's interpreter, one program of the grid after the other, on the host's tensors.

    By itself it adds and multiplies bfloat16 as the integers of the same bits; here each result is that of float32,
    rounded to nearest even, as on a GPU. `tl.dot` has no TF32 and sums in float32. Grid dependency control is left out;
    inline assembly and libdevice are not to be had. Reads beyond a tensor are not noticed, nor races between programs.
    """
    builder = interpreter.InterpreterBuilder
    plain_binary, plain_fma = builder.binary_op, builder.create_fma
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, _widened(a), _widened(b), *rest)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return _narrowed(plain_cast(self, _widened(source), tl.float32))
        return plain_cast(self, _widened(source), target)

    def binary(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        result = plain_binary(self, _widened(left), _widened(right), operation)
        return _narrowed(result) if left.dtype.scalar == tl.bfloat16 else result

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        result = plain_fma(self, _widened(x), _widened(y), _widened(z))
        return _narrowed(result) if z.dtype.scalar == tl.bfloat16 else result

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        interpreter.InterpretedFunction(kernel.fn).run(*args, **options)

    def call(function: Any, *args: Any, **options: Any) -> Any:
        return interpreter.InterpretedFunction(function.fn)(*args, **options)

    with contextlib.ExitStack() as stack:
        for name, replacement in {"binary_op": binary, "create_fma": fma, "create_dot": dot, "cast_impl": cast}.items():
            stack.enter_context(patch.object(builder, name, replacement))
        for name in ("gdc_wait", "gdc_launch_dependents"):
            stack.enter_context(patch.object(tl.extra.cuda, name, lambda: None))
        stack.enter_context(patch.object(jit.JITFunction, "run", run))
        stack.enter_context(patch.object(jit.JITFunction, "__call__", call))
        # Once for all: the interpreter does it at every launch and call, and does not undo it after a call.
        language = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(language.restore)
        stack.enter_context(patch.object(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope()))
        # A number is an array of one element, of which NumPy 2.4 makes no int.
        language.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        # The interpreter would leave its own names in the kernels' modules.
        stack.enter_context(patch.object(interpreter.InterpretedFunction, "rewritten_fn", {}))
        stack.enter_context(patch.object(interpreter.FunctionRewriter, "_compile_and_exec", _rewritten))
        yield


def _rewritten(rewriter: Any, tree: Any) -> FunctionType:
    """The kernel as the interpreter rewrites it, a function with the names of both modules."""
    function = rewriter.fn
    module = compile(tree, filename=rewriter.filename, mode="exec")
    (code,) = (x for x in module.co_consts if isinstance(x, CodeType) and x.co_name == function.__name__)
    names = {**vars(interpreter), **function.__globals__}
    rewritten = FunctionType(code, names, function.__name__, function.__defaults__)
    rewritten.__annotations__ = function.__annotations__  # which arguments are constants
    return rewritten


def _widened(handle: Any) -> Any:
    """The same numbers in float32, if they are bfloat16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(handle: Any) -> Any:
    """Float32 numbers rounded to bfloat16; results of comparisons as they are."""
    if handle.data.dtype != np.float32:
        return handle
    bits = torch.from_numpy(np.array(handle.data)).bfloat16().view(torch.uint16)
    return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)


@dataclass(frozen=True)
class Compiled:
    """What a launch needs of a multiprocessor."""

    name: str
    grid: tuple[int, ...]
    warps: int
    shared: int  # bytes per block
    registers: int  # per thread
    spilled: int  # bytes per thread that found no register
    ptx: str


@contextlib.contextmanager
def compiled(capability: int) -> Iterator[list[Compiled]]:
    """Launches are compiled as they would be on a GPU of this compute capability (80, 90), and not run.

    Needs neither a GPU nor a driver nor a C compiler: Triton brings `ptxas` along.
    """
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernels: list[Compiled] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # The specialisation of a launch: what is known of the alignment of pointers and sizes.
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        arguments, specialization, extra = bind(*args, **options)
        settings, signature, constants, attributes = kernel._pack_args(
            backend, options, arguments, specialization, extra
        )
        source = ASTSource(kernel, signature, constants, attributes)
        result = triton.compile(source, target, settings.__dict__)
        ptx = result.asm["ptx"]
        registers, spilled = _resources(ptx, capability)
        shape = tuple(grid(arguments) if callable(grid) else grid)
        kernels.append(
            Compiled(kernel.__name__, shape, settings.num_warps, result.metadata.shared, registers, spilled, ptx)
        )

    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        patch.object(jit.JITFunction, "run", run),
    ):
        triton.knobs.cache.dir = folder
        yield kernels


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that found none, as the assembler tells of the one kernel in `ptx`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", str(source)]
        log = subprocess.run([*command, "-o", f"{source}.cubin"], check=True, capture_output=True, text=True).stderr
    (stores,), (registers,) = re.findall(r"(\d+) bytes spill stores", log), re.findall(r"Used (\d+) registers", log)
    return int(registers), int(stores)
