"""The VQ tokenizer: an image becomes a square grid of code indices, and back.

Same network, parameter names and shapes as LlamaGen's VQ-16 (Sun et al., "Autoregressive Model Beats Diffusion: Llama
for Scalable Image Generation", arXiv:2406.06525, section 2.1), so the released ``vq_ds16_c2i.pt`` loads unchanged;
other widths, strides and codebook sizes by :class:`VQConfig`.

Shapes: ``B`` batch, ``C`` channels, ``H W`` pixels, ``h w`` token grid, ``L = h*w`` tokens, ``V`` codebook entries,
``K`` code_dim.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.config import MAX_COUNT, setting
from util.errors import UserError

# Usual widths of the resolution levels in multiples of the base width, fine to coarse, by stride.
MULTIPLIERS = {1: (1,), 2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}
_MAX_SCORES = 2**26  # similarities held at once by the nearest-entry search: 256 MiB in float32
_CODEBOOK_USED_SIZE = 65536  # length of the buffer in the released file


@dataclass(frozen=True)
class VQConfig:
    """Size of a tokenizer; the defaults are the released ``vq_ds16_c2i``.

    Each resolution level but the last halves the picture, so the stride is ``2 ** (len(multipliers) - 1)``. Raises
    UserError for values that no tokenizer can be built from.
    """

    base_width: int = setting(128, "channels at full resolution")
    multipliers: tuple[int, ...] = setting(
        MULTIPLIERS[16],
        "width of each resolution, fine to coarse, in multiples of the base width (default: by stride, "
        + ", ".join(f"{stride}: {' '.join(map(str, values))}" for stride, values in MULTIPLIERS.items())
        + ")",
    )
    res_blocks: int = setting(2, "residual blocks per resolution (decoder: one more)")
    z_channels: int = setting(256, "channels next to the codebook")
    codebook_size: int = setting(16384, "number of codes")
    code_dim: int = setting(8, "numbers per code")
    img_size: int | None = setting(None, "side of the pictures it was trained on, pixels; None: unknown, or several")

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        for name, value in vars(self).items():
            if name == "img_size" and value is None:
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(type(number) is int and 0 < number <= MAX_COUNT for number in numbers):
                raise UserError(f"Tokenizer {name} {value!r} can't be used: it takes integers from 1 to {MAX_COUNT}.")
        if self.base_width % 4:
            raise UserError(
                f"Tokenizer base_width {self.base_width} must be a multiple of 4 (channels per norm group)."
            )

    @property
    def stride(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.multipliers) - 1)


class VQModel(nn.Module):
    """Encoder, codebook and decoder. Built with random weights; see ``load_tokenizer`` for trained ones."""

    def __init__(self, config: VQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQConfig()
        self.stride = config.stride
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.code_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        # Residual branches start at zero: training is faster by far when every block begins as the identity.
        for name, parameter in self.named_parameters():
            if ".conv2." in name or ".proj_out." in name:
                nn.init.zeros_(parameter)

    def encode(self, images: Tensor) -> Tensor:
        """Square images (B, 3, H, H), floating point in [-1, 1] → code indices (B, L) int64 in raster order.

        Raises UserError for another shape, or a side that is not a multiple of the stride.
        """
        return self.quantize.nearest(self.features(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Code indices in [0, V), (B, L) with L a square number or (B, h, w) → images (B, 3, H, W), about [-1, 1] but
        not clipped.

        Raises UserError for another shape. The caller must see to the range: checking it here would read a value back
        from the GPU.
        """
        square = indices.ndim == 2 and math.isqrt(indices.shape[1]) ** 2 == indices.shape[1]
        if indices.is_floating_point() or not (square or indices.ndim == 3):
            raise UserError(
                f"Code indices of shape {tuple(indices.shape)} and type {indices.dtype} can't be decoded; they must be "
                "integers of shape (batch, side*side) or (batch, rows, columns)."
            )
        return self.decode_features(self.quantize.lookup(indices))

    def features(self, images: Tensor) -> Tensor:
        """Images as in :meth:`encode` → unit vectors (B, L, K) before quantisation, raster order, at least float32."""
        shape = tuple(images.shape)
        floating = images.ndim == 4 and shape[1] == 3 and images.is_floating_point()
        if not floating or shape[2] != shape[3] or shape[2] % self.stride or shape[2] == 0:
            raise UserError(
                f"Images {shape} of {images.dtype} can't be encoded; this tokenizer takes floating-point ones "
                f"(B, 3, H, H) with a side H that is a multiple of {self.stride}."
            )
        return _unit(self.quant_conv(self.encoder(images)).flatten(2).transpose(1, 2))

    def decode_features(self, features: Tensor) -> Tensor:
        """Codebook vectors (B, L, K) of a square grid in raster order, or (B, h, w, K) → images (B, 3, H, W)."""
        if features.ndim == 3:
            features = features.unflatten(1, (math.isqrt(features.shape[1]),) * 2)
        grid = features.to(self.post_quant_conv.weight.dtype).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(grid))


class Codebook(nn.Module):
    """V entries of K numbers, used L2-normalised."""

    codebook_used: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.normal_(self.embedding.weight)
        # Part of the released file (its trainer's record of codes in use); nothing here reads it.
        self.register_buffer("codebook_used", torch.zeros(_CODEBOOK_USED_SIZE))

    def entries(self) -> Tensor:
        """The unit vectors (V, K), at least float32."""
        return _unit(self.embedding.weight)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) → unit vectors (..., K), at least float32."""
        return _unit(self.embedding(indices))

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """Unit vectors (..., K) → index (...) int64 of the nearest entry.

        Between unit vectors the nearest is the most similar one. Full precision even under autocast: neighbouring
        entries differ by less than a bfloat16 step. The (rows × V) similarities are made piece by piece.
        """
        with torch.autocast(features.device.type, enabled=False):
            rows = features.reshape(-1, features.shape[-1])
            entries = self.entries().to(rows.dtype).T
            pieces = [(piece @ entries).argmax(1) for piece in rows.split(max(1, _MAX_SCORES // entries.shape[1]))]
        return torch.cat(pieces).view(features.shape[:-1])


class Encoder(nn.Module):
    """Images (B, 3, H, W) → (B, z_channels, h, w)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_width * m for m in config.multipliers]
        coarsest = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_width, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(width_in, width_out, config.res_blocks, attention=level == coarsest, downsample=level < coarsest)
            for level, (width_in, width_out) in enumerate(zip([config.base_width, *widths], widths, strict=False))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [*self.conv_blocks, *self.mid]:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) → images (B, 3, H, W); levels run from coarse to fine."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_width * m for m in reversed(config.multipliers)]
        finest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(width_in, width_out, config.res_blocks + 1, attention=level == 0, upsample=level < finest)
            for level, (width_in, width_out) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [*self.mid, *self.conv_blocks]:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by its own attention where asked for, then the change of size."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        blocks: int,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width_in if i == 0 else width_out, width_out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(width_out) for _ in range(blocks if attention else 0))
        self.downsample = _downsample(width_out) if downsample else nn.Identity()
        self.upsample = _upsample(width_out) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, res in enumerate(self.res):
            x = res(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1×1 shortcut where the width changes."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class Attention(nn.Module):
    """Single-head self-attention over the pixels, scale C^-1/2, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, C, h, w) → (B, 1 head, L, C)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(attended)


@contextlib.contextmanager
def exact_precision() -> Iterator[None]:
    """Float32 without TF32 or autotuning: the nearest of thousands of codes must not depend on a choice of kernels."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(width, width), Attention(width), ResBlock(width, width)])


def _downsample(width: int) -> nn.Sequential:
    """Halve the sides: zeros on the right and the bottom, then a 3×3 convolution of stride 2."""
    conv = nn.Conv2d(width, width, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def _upsample(width: int) -> nn.Sequential:
    """Double the sides: repeat every pixel, then a 3×3 convolution."""
    conv = nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0, mode="nearest"), conv=conv))


def _norm(width: int) -> nn.GroupNorm:
    """32 groups as in the released tokenizer, fewer where a group would have less than 4 channels.

    From 128 channels on that is the published GroupNorm(32); one channel per group in a narrow network would be
    instance normalisation, which loses the brightness of a flat picture.
    """
    return nn.GroupNorm(math.gcd(32, width // 4), width, eps=1e-6)


def _unit(x: Tensor) -> Tensor:
    """L2-normalise the last dimension, in float32 or better."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
