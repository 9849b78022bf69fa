"""What the page does, without the page: values of its fields in, pictures and texts out.

Every mistake of a user is a UserError, whose sentence the page shows.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from engine.class_names import class_label
from engine.editing.edit import blend, edit
from engine.editing.masks import enlarge, hole_of_mask
from engine.image_generator import Generated, ImageGenerator
from engine.watch import Trace, frames, pictures_so_far
from orders.config import OrderConfig
from orders.schedule import default_steps
from orders.statistics import order_statistics
from scripts.app.uploads import read_upload
from util.errors import UserError
from util.pictures import picture_name

MAX_PICTURES = 64  # of one click
MAX_WATCHED = 64  # steps, each of which is a picture to decode
_LEAST_STEPS = 16  # by default: small grids have few published steps, and show it
_SHOWN_SIDE, _PAINTED_SIDE = 384, 512  # smaller pictures are enlarged for the screen, by a whole factor
_MEASURED_ORDERS = 100
_TIMED_AGAIN = 1.0  # seconds; what took less has the better time of two runs
_PAINT = np.array([232, 89, 12])  # of what will be generated anew


@dataclass(frozen=True)
class Source:
    """A picture to edit: of the model's size, with its codes int64 (L,)."""

    picture: Image.Image
    codes: Tensor


class Handlers:
    """The handlers of one page; `sampling` are settings of :class:`models.sampling.Sampling`."""

    def __init__(self, generator: ImageGenerator) -> None:
        self.generator = generator
        config = generator.model.config
        self.grid = config.grid_size
        self.default_steps = min(self.grid**2, max(_LEAST_STEPS, default_steps(self.grid)))
        self.painted_side = _enlarged(config.img_size, _PAINTED_SIDE)
        self.classes = [class_label(number, generator.classes) for number in range(config.class_num)]

    def description(self) -> str:
        """One line about the model."""
        config, device = self.generator.model.config, self.generator.device.type
        size = sum(weights.numel() for weights in self.generator.model.parameters()) / 1e6
        pictures = f"{config.img_size}×{config.img_size} pixels from {self.grid}×{self.grid} tokens"
        parts = (str(self.generator.source), f"{size:.1f} million parameters", pictures, f"{config.class_num} classes")
        return " · ".join((*parts, device.upper()))

    def generate(
        self, classes: Sequence[str], count: int, steps: int, order: str, seed: int, **sampling: Any
    ) -> tuple[Generated, list[str], str]:
        """`count` pictures of each class, their labels, and a line about them."""
        _require(pictures=count, steps=steps, seed=seed, **sampling)
        if not classes:
            raise UserError("no class is chosen; choose one or several.")
        if count < 1 or count * len(classes) > MAX_PICTURES:
            raise UserError(f"{count * len(classes)} pictures are asked for; at once there can be 1 to {MAX_PICTURES}.")
        names = [name for name in classes for _ in range(count)]
        made = self.generator.generate(names, steps, order=order, seed=seed, **sampling)
        pictures = "1 picture" if len(names) == 1 else f"{len(names)} pictures"
        line = f"{pictures} of {made.codes.shape[1]} tokens in {steps} steps: {made.seconds:.2f} s"
        return made, [self.classes[self.generator.find_class(name)] for name in names], line

    def archive(self, made: Generated, labels: Sequence[str], settings: dict[str, Any]) -> bytes:
        """A ZIP file of the pictures as they are, and of what made them."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for number, (picture, label) in enumerate(zip(made.pictures, labels, strict=True)):
                archive.writestr(picture_name(number, label), png_of(picture))
            text = json.dumps({"model": str(self.generator.source), **settings}, indent=2, ensure_ascii=False)
            archive.writestr("settings.json", text + "\n")
        return buffer.getvalue()

    def watch(self, name: str, steps: int, order: str, seed: int, **sampling: Any) -> tuple[list[Image.Image], str]:
        """A frame for each step of a picture's decoding, and a line about it."""
        _require(steps=steps, seed=seed, class_=name, **sampling)
        if steps > MAX_WATCHED:
            raise UserError(f"{steps} steps are asked for; at most {MAX_WATCHED} can be watched.")
        made = self.generator.generate([name], steps, order=order, seed=seed, **sampling)
        seconds = made.seconds
        if seconds < _TIMED_AGAIN:
            seconds = min(seconds, self.generator.generate([name], steps, order=order, seed=seed, **sampling).seconds)
        trace = Trace.of(made, 0)
        line = f"**{seconds:.3g} s** for {trace.steps.size} tokens in {steps} steps, order {order}"
        return frames(trace, pictures_so_far(trace, self.generator)), line

    def take_upload(self, path: str | Path) -> Source:
        """The middle of a picture from a file."""
        picture = self.generator.crop(read_upload(path))
        return Source(picture, self.generator.encode(picture))

    def take_generated(self, made: Generated | None, number: int) -> Source:
        """One of the pictures that :meth:`generate` made, with its own codes."""
        if made is None:
            raise UserError("there is no generated picture yet; make one under Generate, or upload one.")
        number = min(number, len(made.codes) - 1)
        return Source(made.pictures[number], made.codes[number])

    def edit(
        self,
        source: Source | None,
        mask: Image.Image,
        inverted: bool,
        name: str,
        variants: int,
        steps: int,
        keep_pixels: bool,
        seed: int,
        **sampling: Any,
    ) -> tuple[list[Image.Image], list[str], str]:
        """Variants of a picture, generated anew where it is painted.

        Args:
            mask: of any size with the picture's sides in the same proportion: white where it is painted.
            inverted: generate where it is not painted.
            keep_pixels: blend the picture's own pixels in, which are otherwise what the tokenizer makes of them.

        Returns:
            The picture, the picture with the hole marked, and the variants; their labels; a line about them.
        """
        if source is None:
            raise UserError("there is no picture to edit yet; upload one, or take a generated one.")
        _require(variants=variants, steps=steps, seed=seed, class_=name, **sampling)
        if not 1 <= variants <= MAX_PICTURES:
            raise UserError(f"{variants} variants are asked for; at once there can be 1 to {MAX_PICTURES}.")
        config = self.generator.model.config
        hole = hole_of_mask(mask, mask.size, config.img_size, self.grid) != inverted
        if not hole.any():
            raise UserError(
                "everything is painted, so that nothing would be generated; paint less."
                if inverted
                else "nothing is painted; paint over what should be generated anew."
            )
        label = self.generator.find_class(name)
        made = edit(self.generator, source.codes, hole, label, variants=variants, steps=steps, seed=seed, **sampling)
        after = made.pictures
        if keep_pixels:
            after = [blend(source.picture, picture, hole) for picture in after]
        marked = np.asarray(source.picture).copy()
        pixels = enlarge(hole, config.stride)
        marked[pixels] = (marked[pixels] * 0.35 + _PAINT * 0.65).astype(np.uint8)
        labels = ["before", "generated anew", *(f"{self.classes[label]}, {i + 1}" for i in range(variants))]
        taken = len(made.group_sizes) - bool(made.known)
        line = f"{int(hole.sum())} of {hole.size} tokens generated anew in {taken} steps: {made.seconds:.2f} s"
        return [source.picture, Image.fromarray(marked), *after], labels, line

    def draw_order(
        self, order: str, side: int, steps: int, proximity: float, repulsion: int, seed: int
    ) -> tuple[Image.Image, str]:
        """A picture of one order; its statistics beside those of random orders in the same steps, as Markdown."""
        from orders.figures import SteppedOrder, order_figure  # loads matplotlib

        _require(steps=steps, proximity=proximity, repulsion=repulsion, seed=seed, tokens=side)
        spec, random = (
            OrderConfig(
                order=kind, generation_steps=steps, proximity_threshold=proximity, repulsion_threshold=repulsion
            ).for_grid(side, seed).spec
            for kind in (order, "random")
        )  # fmt: skip
        numbers = np.arange(_MEASURED_ORDERS)
        buffer = io.BytesIO()
        order_figure(SteppedOrder(spec, spec.draw(numbers[:1])[0])).savefig(buffer, format="png", dpi=90)
        ours, theirs = (
            order_statistics(each.draw(numbers), spec.group_sizes, spec.grid, repulsion).overall()
            for each in (spec, random)
        )
        lines = [f"| mean over {len(numbers)} orders | {order} | random |", "|---|---|---|"]
        for name, key, form in (
            ("tokens with a known neighbour", "near_context", ".1%"),
            ("proximity to known neighbours", "proximity", ".2f"),
            (f"pairs of a step within {repulsion}", "close_pairs", ".1%"),
            ("distance to the nearest of its step", "nearest_in_group", ".2f"),
        ):
            cells = ("–" if np.isnan(column[key]) else format(column[key], form) for column in (ours, theirs))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return Image.open(buffer), "\n".join(lines)


def _require(**values: Any) -> None:
    """Raise UserError for a field that has been emptied."""
    for name, value in values.items():
        if value is None:
            raise UserError(f"the field of {name.strip('_').replace('_', '-')} is empty; fill it in.")


def _enlarged(side: int, within: int) -> int:
    """The largest multiple of a side within a limit; the side itself where it is larger."""
    return side * max(1, within // side)


def shown(picture: Image.Image, within: int = _SHOWN_SIDE) -> Image.Image:
    """A picture for the screen: small ones enlarged, their pixels staying squares."""
    factor = _enlarged(max(picture.size), within) // max(picture.size)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def to_paint(source: Source) -> Image.Image:
    """The picture to paint on."""
    return shown(source.picture, _PAINTED_SIDE)


def mask_of_layers(layers: Sequence[Image.Image], side: int) -> Image.Image:
    """What is painted on layers (RGBA, side × side), transparent elsewhere: white on black."""
    painted = np.zeros((side, side), np.uint8)
    for layer in layers:
        painted[np.asarray(layer.convert("RGBA"))[..., 3] > 127] = 255
    return Image.fromarray(painted)


def png_of(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
