"""What the commands that make pictures have in common: the model, how it decodes, and what they leave behind."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.decoding.decoder import DECODE_PATHS
from engine.image_generator import ImageGenerator
from models.sampling import Sampling
from orders.draw import ORDER_KINDS
from util.config import part, record, setting
from util.dist import DeviceConfig
from util.files import atomic_write

CFG = 4.0  # where none is asked for: of a class, guidance makes more than it costs


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(DeviceConfig):
    """Which model makes pictures."""

    pretrained_ckpt: Path | None = setting(
        None,
        "a checkpoint, an exported folder or a name on the hub (default: the demo's model, where it was trained, "
        "else pretrained/produce)",
    )
    vqgan_path: Path | None = setting(None, "its tokenizer (default: the model's own)")
    use_ema: bool = setting(False, "the moving average of the weights")
    bf16: bool | None = setting(None, "bfloat16 autocast (default: on a GPU)")

    def open_generator(self) -> ImageGenerator:
        """The model; UserError for a file that is missing or does not fit."""
        return ImageGenerator(
            self.pretrained_ckpt, self.vqgan_path, device=self.device, use_ema=self.use_ema, bf16=self.bf16
        )


@dataclass(frozen=True, kw_only=True)
class PictureConfig(GeneratorConfig):
    """That, and how it makes them."""

    seed: int = setting(0, "of orders and draws", at_least=0, below=2**63)
    steps: int | None = setting(None, "of decoding a whole picture (default: as published)", at_least=1)
    order: str = setting("lpd", "kind of the orders", choices=ORDER_KINDS)
    decode_path: str = setting("plain", "others than plain pay for many pictures", choices=DECODE_PATHS)
    sampling: Sampling = part(default_factory=Sampling)

    def settings(self) -> dict[str, Any]:
        """For the methods of the generator."""
        return {"steps": self.steps, "order": self.order, "seed": self.seed, "path": self.decode_path} | record(
            self.sampling
        )


def write_record(path: Path, generator: ImageGenerator, config: PictureConfig, **made: Any) -> None:
    """One line of JSON, to a file and to stdout: what was made, and all that it follows from."""
    device = str(generator.device)
    versions = {"torch": importlib.metadata.version("torch"), "device": device, "bf16": generator.bf16}
    line = json.dumps(made | {"settings": record(config), "files": generator.files(), "environment": versions})
    with atomic_write(path) as file:
        file.write(f"{line}\n".encode())
    print(line, flush=True)
