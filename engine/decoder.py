"""Generation prepared once and run many times: labels, orders and seeds in, codes and pictures out.

Shape legend: `B` images, `L` tokens of an image, `H` `W` pixels.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.generate import Sampling, check_batch, decode, draw_codes, make_cache
from models.block import Attend, Block
from models.inference import bf16_copy, can_pack, packed_copy, share_weights
from models.lpd import LPD
from tokenizers import VQModel
from util.errors import UserError
from util.images import to_uint8

DECODE_PATHS = ("auto", "plain", "packed", "packed_float16", "packed_int8", "compiled", "graph")
_PIXELS_AT_ONCE = 64 * 256 * 256  # decoded in one piece: enough to fill a GPU, and bounds the memory


class Decoded(NamedTuple):
    """Codes (B, L) int64 in raster order; pictures (B, H, W, 3) uint8, or None without a tokenizer."""

    codes: Tensor
    images: Tensor | None


class Decoder:
    """The decoding loop for one model, schedule, batch size and sampling.

    The paths give the same images for the same seeds, up to the rounding of their precision:

    - ``plain``: the model as it is, step by step.
    - ``packed``: weights packed for the CPU's matrix kernels; ``packed_float16``, ``packed_int8``: stored so as well.
    - ``compiled``: what lies around the attention compiled, weights and VQ decoder cast once where `bf16` is on.
    - ``graph``: that, and all of it, from labels to pixels, captured in one CUDA graph with static buffers, and
      replayed. Nothing is read back from the device on the way.
    - ``auto``: ``graph`` on a GPU, ``packed`` on a CPU where that is possible, else ``plain``.

    The copies follow no later change of the model's weights.
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
    ) -> None:
        """
        Args:
            model: in eval mode, on the device to use.
            batch_size: images of a call.
            tokenizer: decodes the pictures; None gives codes only.
            bf16: bfloat16 autocast; logits, guidance and noise are float32 all the same.
            with_class: False decodes without labels (then `sampling.cfg` must be 1).

        Raises:
            UserError: for settings that do not fit the model or the device.
        """
        self.device = model.pos_embed.device
        self.path = resolve_path(path, self.device, model.pos_embed.dtype, bf16)
        self.batch_size, self.group_sizes, self.sampling, self.bf16 = batch_size, tuple(group_sizes), sampling, bf16
        if model.training:
            raise UserError("the model is in training mode; call model.eval() before generating.")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} must be at least 1.")
        sampling.check(model.config.vocab_size)
        L = model.config.num_tokens
        self.orders = torch.arange(L, device=self.device).repeat(batch_size, 1)
        self.seeds = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self.labels = torch.zeros_like(self.seeds) if with_class else None
        model.check_inputs(self.orders, group_sizes)
        check_batch(model, self.labels, self.orders, self.seeds, sampling.guided)

        self._draw: Callable[..., Tensor] = draw_codes
        self._to_pixels: Callable[[VQModel, Tensor], Tensor] = _to_pixels
        if self.path.startswith("packed"):
            model = packed_copy(model, self.path.removeprefix("packed").removeprefix("_") or "float32")
        elif self.path in ("compiled", "graph"):
            model = bf16_copy(model) if bf16 else share_weights(model)
            _compile_blocks(model)
            self._draw = torch.compile(draw_codes)
            self._to_pixels = torch.compile(_to_pixels)
            if tokenizer is not None and bf16:
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.post_quant_conv.to(torch.bfloat16)
                tokenizer.decoder.to(torch.bfloat16)
                tokenizer.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model, self.tokenizer = model, tokenizer
        with self._precision():
            self.cache = make_cache(model, batch_size * (2 if sampling.guided else 1))
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.path == "graph":
            self._capture()

    def __call__(self, labels: Tensor | None, orders: Tensor, seeds: Tensor) -> Decoded:
        """Generate one batch.

        Args:
            labels: integer (B,) classes, or None where the decoder was made without class.
            orders: integer (B, L), each row a permutation of raster indices.
            seeds: integer (B,); an image's draws follow its seed alone.

        Raises:
            UserError: for a batch that does not fit. Values are checked where the tensors are on the host; a look at
                values on the device would have to wait for it.
        """
        if (labels is None) != (self.labels is None):
            raise UserError("labels are given to a decoder made without class, or missing for one made with classes.")
        if orders.shape != self.orders.shape:
            raise UserError(
                f"orders have shape {tuple(orders.shape)}; this decoder was made for {tuple(self.orders.shape)}."
            )
        if orders.device.type == "cpu":
            check_batch(self.model, labels, orders, seeds, self.sampling.guided)
        with self._precision():
            if labels is not None and self.labels is not None:
                self.labels.copy_(labels, non_blocking=True)
            self.orders.copy_(orders, non_blocking=True)
            self.seeds.copy_(seeds, non_blocking=True)
            if self.graph is None:
                return self._run()
            self.graph.replay()
            codes, images = self._captured
            return Decoded(codes.clone(), None if images is None else images.clone())

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with (
            torch.inference_mode(),
            # Casts are not kept: a graph must not hold on to tensors that live outside of it.
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False),
            # cuDNN would build a plan for each of a schedule's shapes.
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
            # One function serves all layers and steps of all decoders; by default the ninth variant would be eager.
            torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
        ):
            yield

    def _run(self) -> Decoded:
        codes = decode(
            self.model, self.labels, self.orders, self.seeds, self.group_sizes, self.sampling, self.cache, self._draw
        )
        if self.tokenizer is None:
            return Decoded(codes, None)
        side = self.model.config.grid_size * self.tokenizer.stride
        pieces = codes.split(max(1, _PIXELS_AT_ONCE // side**2))
        return Decoded(codes, torch.cat([self._to_pixels(self.tokenizer, piece) for piece in pieces]))

    def _capture(self) -> None:
        with torch.cuda.device(self.device), self._precision():
            # Compiling, choosing of kernels and library workspaces must lie behind before the capture.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._captured = self._run()
            self.graph = graph


def resolve_path(path: str, device: torch.device, dtype: torch.dtype, bf16: bool) -> str:
    """What ``auto`` means for a model of this dtype; UserError for a path that it or its device does not have."""
    if path not in DECODE_PATHS:
        raise UserError(f"decode path {path!r} does not exist; choose one of {', '.join(DECODE_PATHS)}.")
    if path == "auto":
        if device.type == "cuda":
            return "graph"
        return "packed" if can_pack("float32") and dtype == torch.float32 and not bf16 else "plain"
    if path == "graph" and device.type != "cuda":
        raise UserError(f"decode path graph needs a CUDA GPU, the model is on {device}; use compiled, packed or plain.")
    if path.startswith("packed") and (bf16 or device.type != "cpu" or dtype != torch.float32):
        raise UserError(
            f"decode path {path} is for float32 models on the CPU without bf16; use auto, plain or compiled."
        )
    return path


def _to_pixels(tokenizer: VQModel, codes: Tensor) -> Tensor:
    return to_uint8(tokenizer.decode(codes))


class _CompiledBlock(nn.Module):
    """A block whose parts before and after the attention are compiled functions, shared by all blocks."""

    def __init__(self, block: Block, before: Callable[..., tuple[Tensor, ...]], after: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.before, self.after = block, before, after

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        return self.after(self.block, x, attend(*self.before(self.block, x)))


def _compile_blocks(model: LPD) -> None:
    """Compile once for all layers and all numbers of rows."""
    before = torch.compile(Block.before_attention)
    after = torch.compile(Block.after_attention)
    model.blocks = nn.ModuleList(_CompiledBlock(cast(Block, block), before, after) for block in model.blocks)
