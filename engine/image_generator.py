"""A trained model from Python: classes in, pictures out.

generator = ImageGenerator("runs/demo/lpd/checkpoint-last.pth", "runs/demo/tokenizer/tokenizer.pt")
for number, picture in enumerate(generator([3, 1, 4], steps=16, cfg=4.0)):
    picture.save(f"{number}.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.generate import generate_images
from engine.hub.remote import choose_tokenizer, choose_weights, find_file, own_tokenizer
from engine.model_choice import check_tokenizer, class_names, load_pretrained, recorded_config
from models import config_of_weights
from models.lpd import LPD, load_weights
from models.sampling import Sampling, image_seeds
from orders.config import OrderConfig
from orders.schedule import default_steps
from tokenizers import load_tokenizer
from util.dist import resolve_device
from util.errors import UserError
from util.files import sha256


class ImageGenerator:
    """A model with its tokenizer, on one device.

    Args:
        checkpoint: a checkpoint (the released ones too), an exported folder, or `user/model` on the hub.
        tokenizer: a file, a folder or a name likewise; the exported folder has its own.
        bf16: bfloat16 autocast; None: on a GPU.

    Raises:
        UserError: for a file that is missing or damaged, or not what it should be.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        tokenizer: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        use_ema: bool = False,
        bf16: bool | None = None,
    ) -> None:
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.bf16 = self.device.type == "cuda" if bf16 is None else bf16
        weights = find_file(Path(checkpoint), choose_weights)
        content = load_pretrained(weights, use_ema)
        codes = own_tokenizer(Path(checkpoint)) if tokenizer is None else Path(tokenizer)
        if codes is None:
            raise UserError(f"{checkpoint} is a file: give its tokenizer as well; an exported folder has its own.")
        tokenizer_file = find_file(codes, choose_tokenizer)
        self.tokenizer = load_tokenizer(tokenizer_file, self.device)
        check_tokenizer(content, weights, sha256(tokenizer_file))
        self.paths = {"pretrained_ckpt": weights, "vqgan_path": tokenizer_file}
        config = recorded_config(content, weights) or config_of_weights(content["model"], self.tokenizer.stride)
        model = LPD(config)
        load_weights(model, content["model"], str(weights))
        self.model = model.to(self.device).eval()
        self.classes = class_names(model.config, content.get("classes"))

    def files(self) -> dict[str, dict[str, str]]:
        """Path and SHA-256 of weights and tokenizer, as the results of an evaluation have them."""
        return {name: {"path": str(path), "sha256": sha256(path)} for name, path in self.paths.items()}

    def __call__(
        self,
        classes: Sequence[int | str],
        steps: int | None = None,
        *,
        order: str = "lpd",
        seed: int = 0,
        **sampling: Any,
    ) -> list[Image.Image]:
        """One picture for each class, given by number or by name.

        Args:
            steps: decoding steps; None: those of the published results on this grid.
            order: kind of the generation orders.
            seed: picture i has the order and the draws of image i of an evaluation with this seed.
            sampling: settings of :class:`models.sampling.Sampling`, such as ``cfg=4.0``.

        Raises:
            UserError: for a class that the model does not have, or a setting out of its range.
        """
        grid, numbers = self.model.config.grid_size, np.arange(len(classes))
        steps = default_steps(grid) if steps is None else steps
        orders = OrderConfig(order=order, generation_steps=steps).for_grid(grid, seed, len(classes))
        images = generate_images(
            self.model,
            self.tokenizer,
            torch.tensor([self._label(name) for name in classes]),
            torch.from_numpy(orders.of_images(numbers)),
            orders.group_sizes,
            Sampling(**sampling),
            image_seeds(seed, torch.from_numpy(numbers)),
            self.bf16,
        )
        return [Image.fromarray(pixels) for pixels in images.cpu().numpy()]

    def _label(self, name: int | str) -> int:
        if not isinstance(name, str):
            return int(name)
        names = self.classes or []
        if name not in names:
            raise UserError(f"the model has no class {name!r}; it has {', '.join(names) or 'classes without names'}.")
        return names.index(name)
