"""Pictures from a trained model: classes by name or number in, PNG files out.

python -m scripts.generate --pretrained_ckpt checkpoints/lpd_l_256.pth --vqgan_path checkpoints/vq_ds16_c2i.pt \\
    --classes "golden retriever" 207 --each 3 --steps 20 --output_dir runs/retrievers

Picture i is image i of an evaluation with this seed: its class, its order and its draws decide it, not the batch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.class_names import class_label
from engine.image_generator import Generated, ImageGenerator
from engine.watch import Trace, frames, pictures_so_far
from scripts.picture_flags import CFG, PictureConfig, write_record
from util.animation import save_animation
from util.cli import Parser, exit_on_user_error, from_args
from util.config import MAX_COUNT, check, setting
from util.files import check_output_dir
from util.pictures import image_grid, picture_name, save_png

ANIMATIONS = ("gif", "webp")
_SHEET, _SHEET_COLUMNS = 256, 8  # pictures of the contact sheet at most; in a row, where classes do not make the rows


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PictureConfig):
    """Which pictures, and what is written."""

    classes: tuple[str, ...] = setting(help="names or numbers of classes")
    each: int = setting(1, "pictures of each class", at_least=1, at_most=MAX_COUNT)
    output_dir: Path = setting(Path("runs/pictures"), "PNG files, the contact sheet grid.png, pictures.json")
    batch_size: int = setting(8, "pictures at once", at_least=1, at_most=MAX_COUNT)
    animate: str | None = setting(None, "a moving picture of each decode as well: gif or webp", choices=ANIMATIONS)

    def __post_init__(self) -> None:
        check(self)


def run(config: GenerateConfig) -> None:
    """Generate and write everything; the names, in the order of the numbers, are in the line of JSON."""
    check_output_dir(config.output_dir)
    generator = config.open_generator()
    labels = [generator.find_class(name) for name in config.classes for _ in range(config.each)]
    titles = [class_label(label, generator.classes) for label in labels]
    made: list[dict[str, Any]] = []
    shown: list[np.ndarray] = []
    seconds, sizes = 0.0, None
    starts = range(0, len(labels), config.batch_size)
    with tqdm(total=len(labels), unit="picture", disable=len(starts) == 1, file=sys.stderr) as bar:
        for start in starts:
            numbers = range(start, min(start + config.batch_size, len(labels)))
            generated = generator.generate([labels[i] for i in numbers], numbers=numbers, **config.settings())
            seconds, sizes = seconds + generated.seconds, generated.group_sizes
            for i, pixels in zip(numbers, generated.images, strict=True):
                path = config.output_dir / picture_name(i, titles[i])
                save_png(pixels, path)
                if config.animate:
                    _animate(path.with_suffix(f".{config.animate}"), generator, generated, i - start)
                made.append({"file": path.name, "class": labels[i], "name": titles[i], "number": i})
            shown += list(generated.images[: _SHEET - len(shown)])
            bar.update(len(numbers))
    columns = config.each if 1 < config.each <= _SHEET_COLUMNS else min(_SHEET_COLUMNS, len(labels))
    save_png(image_grid(np.stack(shown), columns, titles[: len(shown)]), config.output_dir / "grid.png")
    write_record(
        config.output_dir / "pictures.json", generator, config,
        pictures=made, group_sizes=sizes, seconds=round(seconds, 4),
    )  # fmt: skip


def _animate(path: Path, generator: ImageGenerator, generated: Generated, index: int) -> None:
    trace = Trace.of(generated, index)
    save_animation(path, frames(trace, pictures_so_far(trace, generator)))


def main() -> None:
    parser = Parser(prog="python -m scripts.generate", description="Pictures of classes, as PNG files.")
    parser.add_config(GenerateConfig, defaults={"cfg": CFG})
    run(from_args(GenerateConfig, parser.parse_args()))


if __name__ == "__main__":
    exit_on_user_error(main)
