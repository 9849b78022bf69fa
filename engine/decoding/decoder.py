"""Generation prepared once and run many times: labels, orders and seeds in, codes and pictures out.

Shape legend: `B` images, `L` tokens of an image, `H` `W` pixels.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.decoding.loop import check_batch, decode, draw_codes, make_cache
from engine.decoding.turns import GraphTurns, Turns
from engine.decoding.weights import Weights
from models.inference import CompiledLPD, can_pack, check_can_pack, narrow_copy, packed_copy, share_weights
from models.lpd import LPD
from models.sampling import Sampling, noise_keys
from tokenizers import VQModel
from util.errors import UserError
from util.pictures import to_uint8
from util.shapes import shapes_only

logger = logging.getLogger(__name__)
DECODE_PATHS = (
    *("auto", "plain", "packed", "packed_bfloat16", "packed_float16", "packed_int8"),
    *("compiled", "graph_library", "graph", "graph_float8"),
)
# Of auto, where preparing a path fails.
_FALLBACKS = {
    **{"graph": "graph_library", "graph_library": "compiled", "compiled": "plain"},
    **{"packed": "plain", "packed_bfloat16": "plain"},
}
_PIXELS_AT_ONCE = 64 * 256 * 256  # decoded in one piece: enough to fill a GPU, and bounds the memory


class Decoded(NamedTuple):
    """Codes (B, L) int64 in raster order; pictures (B, H, W, 3) uint8, or None without a tokenizer."""

    codes: Tensor
    images: Tensor | None


class Decoder:
    """The decoding loop for one model, schedule, batch size and sampling.

    The paths give the same images for the same seeds, up to the rounding of their precision:

    - ``plain``: the model step by step, its linear weights cast once where `bf16` is on.
    - ``packed``: weights packed for the CPU's matrix kernels; ``packed_float16``, ``packed_int8``: stored so as well.
    - ``packed_bfloat16``: that for `bf16`, which it implies; needs a CPU that has bfloat16 instructions.
    - ``compiled``: what lies around the attention compiled, weights and VQ decoder cast once where `bf16` is on.
    - ``graph_library``: that, and all of it, from labels to pixels, captured in one CUDA graph with static buffers, and
      replayed. Nothing is read back from the device on the way.
    - ``graph``: that with own kernels for the attention and for steps of few rows (:mod:`models.fused`), where `bf16`
      is on and the sizes of a float32 model allow it; else it is ``graph_library``.
    - ``graph_float8``: that with weights stored in 8 bits, one scale per output (visibly less exact).
    - ``auto``: ``graph`` on a GPU; on a CPU that can, ``packed``, or ``packed_bfloat16`` with `bf16`; else ``plain``.
      Where a path cannot be prepared, a warning says why, and the next simpler one is taken.

    A decoder serves the weights it was made with: once they have changed, a call is an error
    (:class:`engine.decoding.weights.Weights` says which changes are seen). It may be called from several threads and
    streams; calls then run one after the other, and so do those of all ``graph`` decoders of a GPU.
    """

    def __init__(
        self,
        model: LPD,
        group_sizes: Sequence[int],
        sampling: Sampling,
        batch_size: int,
        *,
        tokenizer: VQModel | None = None,
        path: str = "auto",
        bf16: bool = False,
        with_class: bool = True,
        with_known: bool = False,
    ) -> None:
        """
        Args:
            model: in eval mode, on the device to use.
            batch_size: images of a call.
            tokenizer: decodes the pictures; None gives codes only.
            bf16: bfloat16 autocast; logits (of bfloat16 factors), guidance and noise are float32 all the same.
            with_class: False decodes without labels (then `sampling.cfg` must be 1).
            with_known: the codes of the first group are known: each call is given them and generates the others. How
                many are known is part of the schedule, as the shapes of a graph are.

        Raises:
            UserError: for settings that do not fit the model or the device.
            Exception: of any kind, where a path other than ``auto`` cannot be prepared.
        """
        self.device = model.pos_embed.device
        self.path = resolve_path(path, self.device, model.pos_embed.dtype, bf16)
        if self.path == "graph" and not has_own_kernels(model, bf16):
            self.path = "graph_library"
        if self.path == "graph_float8" and not has_own_kernels(model, bf16, float8=True):
            raise UserError(
                "decode path graph_float8 needs bf16, a GPU of compute capability 8.9, and a float32 model whose "
                "width, hidden units and codes are multiples of 64; use graph."
            )
        bf16 = bf16 or self.path == "packed_bfloat16"
        self.batch_size, self.group_sizes, self.sampling, self.bf16 = batch_size, tuple(group_sizes), sampling, bf16
        if model.training:
            raise UserError("the model is in training mode; call model.eval() before generating.")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} must be at least 1.")
        sampling.check_top_k(model.config.vocab_size)
        orders = torch.arange(model.config.num_tokens).repeat(batch_size, 1)
        seeds = torch.zeros(batch_size, dtype=torch.int64)
        labels = torch.zeros_like(seeds) if with_class else None
        model.check_inputs(orders, group_sizes)
        check_batch(model, labels, orders, seeds, sampling.guided)
        # One piece of memory, filled by one copy. Orders and seeds, which compiled code reads, are aligned for it.
        codes = torch.zeros_like(orders) if with_known else None
        tensors = [tensor for tensor in (orders, seeds, labels, codes) if tensor is not None]
        self._inputs = torch.empty(sum(map(torch.numel, tensors)), dtype=torch.int64, device=self.device)
        pieces = self._inputs.split([tensor.numel() for tensor in tensors])
        self._buffers = [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
        self.orders, self.seeds = self._buffers[:2]
        self.labels = None if labels is None else self._buffers[2]
        self.codes = None if codes is None else self._buffers[-1]
        self._copy_in(tensors)
        self._weights = [Weights(module) for module in (model, tokenizer) if module is not None]
        while not self._prepare(model, tokenizer, falls_back=path == "auto"):
            self.path = _FALLBACKS[self.path]

    def _prepare(self, model: LPD, tokenizer: VQModel | None, falls_back: bool) -> bool:
        """Whether this path works; a failure is an error where there is nothing to fall back on."""
        try:
            self._make(model, tokenizer)
            return True
        except UserError:
            raise
        except Exception as error:
            if not falls_back or self.path not in _FALLBACKS:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            reason = " … ".join(dict.fromkeys((lines[0], lines[-1])))  # Triton says where first, and why last
            logger.warning(
                "decode path %s cannot be prepared (%s: %s); taking %s, which is slower; --decode_path %s shows all of "
                "the error",
                *(self.path, type(error).__name__, reason, _FALLBACKS[self.path], self.path),
            )
        # Here the error is gone, and with it the frames that held on to memory.
        for name in ("model", "tokenizer", "cache", "graph", "_captured"):
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _make(self, model: LPD, tokenizer: VQModel | None) -> None:
        self._draw: Callable[..., Tensor] = draw_codes
        self._keys: Callable[[Tensor, Tensor], Tensor] = noise_keys
        self._to_pixels: Callable[[VQModel, Tensor], Tensor] = _to_pixels
        self.compiled = self.path == "compiled" or self.path.startswith("graph")
        sequences = self.batch_size * (2 if self.sampling.guided else 1)
        if self.path.startswith("packed"):
            model = packed_copy(model, _packed_weights(self.path))
        elif self.path in ("graph", "graph_float8"):
            from models.fused import fused_copy  # needs Triton, which not every build of torch has

            rows = max(map(sum, itertools.pairwise((1, *self.group_sizes))))
            model = fused_copy(model, sequences, rows, float8=self.path == "graph_float8")
        elif self.bf16:
            model = narrow_copy(model, kind=CompiledLPD if self.compiled else type(model))
        elif self.compiled:
            model = share_weights(model, CompiledLPD)
        if self.compiled:
            self._draw, self._keys = compile_draw(self.device), torch.compile(noise_keys)
            # A symbolic batch size would switch off the choice of layouts for convolutions.
            self._to_pixels = torch.compile(_to_pixels, dynamic=False)
        if self.bf16 and tokenizer is not None and self.path != "plain":
            tokenizer = _narrow_decoder(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.graph: torch.cuda.CUDAGraph | None = None
        self._turns = GraphTurns.of(self.device) if self.path.startswith("graph") else Turns(self.device)
        with self._mode():
            self.cache = make_cache(model, sequences)
            if self.compiled:  # compiles, or fails, here and not at the first call
                self._run()
        with self._turns.take() as stream:  # a first call on another stream waits for all this too
            self._streams = {stream}
            if isinstance(self._turns, GraphTurns):
                self._capture(self._turns.capture_stream)

    def __call__(self, labels: Tensor | None, orders: Tensor, seeds: Tensor, codes: Tensor | None = None) -> Decoded:
        """Generate one batch.

        Args:
            labels: integer (B,) classes, or None where the decoder was made without class.
            orders: integer (B, L), each row a permutation of raster indices.
            seeds: integer (B,); an image's draws follow its seed alone.
            codes: integer (B, L) in raster order, of which those of the first group are kept; None where the decoder
                was made without known codes.

        Returns:
            Tensors made in inference mode: clone them to use them where gradients are recorded.

        Raises:
            UserError: for a batch that does not fit. Values are checked where the tensors are on the host; a look at
                values on the device would have to wait for it. There, labels and indices must be right: own kernels
                read whatever memory a wrong one names.
        """
        if (labels is None) != (self.labels is None):
            raise UserError("labels are given to a decoder made without class, or missing for one made with classes.")
        if (codes is None) != (self.codes is None):
            raise UserError("known codes are given to a decoder made without them, or missing for one made with them.")
        named = {"orders": orders, "seeds": seeds, "labels": labels, "known codes": codes}
        given = {name: tensor for name, tensor in named.items() if tensor is not None}
        for buffer, (name, tensor) in zip(self._buffers, given.items(), strict=True):
            if tensor.shape != buffer.shape:
                raise UserError(
                    f"{name} have shape {tuple(tensor.shape)}; this decoder was made for {tuple(buffer.shape)}."
                )
        tensors = list(given.values())
        if all(tensor.device.type == "cpu" for tensor in tensors):
            check_batch(self.model, labels, orders, seeds, self.sampling.guided, codes)
        with self._turns.take() as stream:
            if stream not in self._streams:
                self._use_on(stream)
            if self.graph is not None:
                return self._replay(self.graph, tensors)
            self._check_weights()
            with self._mode():
                self._copy_in(tensors)
                return self._run()

    def _replay(self, graph: torch.cuda.CUDAGraph, tensors: list[Tensor]) -> Decoded:
        with torch.inference_mode():
            self._copy_in(tensors)
            graph.replay()
            codes, images = self._captured
            decoded = Decoded(codes.clone(), None if images is None else images.clone())
        self._check_weights()  # last, when the GPU is at work
        return decoded

    def _copy_in(self, tensors: list[Tensor]) -> None:
        """Fill the static buffers from orders, seeds and, where the decoder has them, labels and known codes."""
        if self.device.type == "cuda" and all(tensor.device.type == "cpu" for tensor in tensors):
            self._inputs.copy_(_staged(tensors), non_blocking=True)
            return
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            if self.device.type == "cuda" and tensor.device.type == "cpu":
                tensor = _staged([tensor]).view_as(buffer)
            buffer.copy_(tensor, non_blocking=True)

    def _check_weights(self) -> None:
        if any(weights.changed() for weights in self._weights):
            raise UserError("the model's weights have changed since this decoder was made; make a new one.")

    def _use_on(self, stream: torch.cuda.Stream | None) -> None:
        """Keep what calls on this stream use, if it is dropped meanwhile, until they are done."""
        self._streams.add(stream)
        modules = [module for module in (self.model, self.tokenizer) if module is not None]
        held = itertools.chain(*(itertools.chain(module.parameters(), module.buffers()) for module in modules))
        for tensor in (self._inputs, self.cache.key_values, *held):
            tensor.record_stream(stream)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """Inference mode, autocast and choice of kernels while the decoder runs; restored whatever happens."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.inference_mode())
            # In inference mode autocast keeps no casts anyway.
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, self.bf16, cache_enabled=False))
            # cuDNN would build a plan for each of a schedule's shapes.
            backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(backends))
            if self.compiled:
                # One function serves the layers and steps of all decoders; by default the ninth variant would be eager.
                limits = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
                stack.enter_context(torch._dynamo.config.patch(limits))
            yield

    def _run(self) -> Decoded:
        codes = decode(
            self.model,
            self.labels,
            self.orders,
            self.seeds,
            self.group_sizes,
            self.sampling,
            self.cache,
            self._draw,
            self._keys,
            self.codes,
        )
        if self.tokenizer is None:
            return Decoded(codes, None)
        side = self.model.config.grid_size * self.tokenizer.stride
        pieces = codes.split(max(1, _PIXELS_AT_ONCE // side**2))
        return Decoded(codes, torch.cat([self._to_pixels(self.tokenizer, piece) for piece in pieces]))

    def _capture(self, stream: torch.cuda.Stream) -> None:
        with self._mode():
            outer = torch.cuda.current_stream()
            stream.wait_stream(outer)
            try:
                with torch.cuda.stream(stream):
                    self._run()  # library workspaces belong to a stream, and must be there before the capture
                    stream.synchronize()
                    graph = torch.cuda.CUDAGraph(keep_graph=True)  # for its nodes to be counted
                    # Other threads, such as one that pins batches, may work meanwhile.
                    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                        self._captured = self._run()
                    graph.instantiate()
            finally:
                outer.wait_stream(stream)  # also where it fails: what ran there may still use memory that is freed now
            self.graph = graph

    def graph_nodes(self) -> int | None:
        """Nodes of the captured CUDA graph: kernels, copies and fills. None where there is no graph."""
        if self.graph is None:
            return None
        nodes = ctypes.c_size_t()
        runtime = ctypes.CDLL(None)  # the process, into which torch has loaded the CUDA runtime for all to see
        graph = ctypes.c_void_p(self.graph.raw_cuda_graph())
        status = runtime.cudaGraphGetNodes(graph, None, ctypes.byref(nodes))
        if status != 0:
            raise RuntimeError(f"cudaGraphGetNodes fails with status {status}.")
        return nodes.value


def resolve_path(path: str, device: torch.device, dtype: torch.dtype, bf16: bool) -> str:
    """What ``auto`` means for a model of this dtype; UserError for a path that it or its device does not have."""
    if path not in DECODE_PATHS:
        raise UserError(f"decode path {path!r} does not exist; choose one of {', '.join(DECODE_PATHS)}.")
    if path == "auto":
        if device.type == "cuda":
            return "graph"
        packed = "packed_bfloat16" if bf16 else "packed"
        return packed if dtype == torch.float32 and can_pack(_packed_weights(packed)) else "plain"
    if path.startswith("graph") and device.type != "cuda":
        raise UserError(f"decode path {path} needs a CUDA GPU, this is {device}; use compiled, packed or plain.")
    if path.startswith("packed"):
        if device.type != "cpu" or dtype != torch.float32:
            raise UserError(f"decode path {path} is for float32 models on the CPU; use auto, plain or compiled.")
        if bf16 and path != "packed_bfloat16":
            raise UserError(f"decode path {path} does not go with bf16; use auto, plain, packed_bfloat16 or compiled.")
        check_can_pack(_packed_weights(path))
    return path


def _packed_weights(path: str) -> str:
    """How a packed path stores weights."""
    return path.removeprefix("packed").removeprefix("_") or "float32"


def has_own_kernels(model: LPD, bf16: bool, float8: bool = False) -> bool:
    """Whether :mod:`models.fused` can decode this model on its device."""
    device = model.pos_embed.device
    if device.type != "cuda" or not bf16 or model.pos_embed.dtype != torch.float32:
        return False
    if torch.cuda.get_device_capability(device) < ((8, 9) if float8 else (8, 0)) or find_spec("triton") is None:
        return False
    from models.fused import has_kernels

    return has_kernels(model.config)


def _staged(tensors: list[Tensor]) -> Tensor:
    """Copies int64, one behind the other, in pinned memory, from which a copy to a GPU does not wait.

    Torch hands out such memory again only when that copy is done; the caller may write to the originals at once.
    """
    staged = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=torch.int64, pin_memory=True)
    return torch.cat([tensor.reshape(-1) for tensor in tensors], out=staged)


def compile_draw(device: torch.device) -> Callable[..., Tensor]:
    """:func:`engine.decoding.loop.draw_codes` compiled; on a GPU two kernels where neither top-k nor top-p is on."""
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "realize_opcount_threshold": 60,  # by default (30) the noise's bits would be written out by a third
        "triton.coalesce_tiling_analysis": False,  # fails for a symbolic batch size, and ignores it (torch 2.11)
    }
    return torch.compile(draw_codes, options=options if device.type == "cuda" else None)


def _to_pixels(tokenizer: VQModel, codes: Tensor) -> Tensor:
    return to_uint8(tokenizer.decode(codes))


def _narrow_decoder(tokenizer: VQModel) -> VQModel:
    """A tokenizer over the same weights whose decoding half is bfloat16, channels last."""
    with shapes_only():
        twin = VQModel(tokenizer.config).requires_grad_(False)
    twin.load_state_dict(tokenizer.state_dict(), assign=True)
    twin.post_quant_conv.to(torch.bfloat16)
    twin.decoder.to(torch.bfloat16)
    twin.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return twin.eval()
