"""Moving pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from util.files import atomic_write

_GIF_COLOURS = 64


def save_animation(path: str | Path, frames: Sequence[Image.Image], milliseconds: int = 450) -> None:
    """Write frames as an endless GIF, or WebP by the name's suffix, atomically; the last stays five times as long."""
    durations = [milliseconds] * (len(frames) - 1) + [5 * milliseconds]
    first, *others = frames
    with atomic_write(path) as file:
        if Path(path).suffix == ".webp":
            first.save(file, "WebP", save_all=True, append_images=others, duration=durations, loop=0, lossless=True)
            return
        first, *others = (frame.quantize(_GIF_COLOURS, dither=Image.Dither.NONE) for frame in frames)
        first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
