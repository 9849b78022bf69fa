"""Pictures of the same samples, drawn again and again while a model is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from engine.evaluation.config import EvalConfig
from engine.generate import generate_images
from models.lpd import LPD, LPDConfig
from models.sampling import image_seeds
from tokenizers import VQModel
from util.dist import Dist
from util.pictures import image_grid

MAX_CLASSES, IMAGES_PER_CLASS = 8, 4


class SampleGrid:
    """One row for each of up to 8 classes, spread over all, with 4 images; classes, orders and noise never change.

    Args:
        evaluation: how to sample and to draw orders; what concerns scores doesn't matter.
        classes: their names in label order, where they are known.

    Raises:
        UserError: for settings that don't fit the model.
    """

    def __init__(
        self, config: LPDConfig, tokenizer: VQModel, evaluation: EvalConfig, classes: Sequence[str] | None, dist: Dist
    ) -> None:
        self.tokenizer, self.evaluation, self.classes, self.dist = tokenizer, evaluation, classes, dist
        shown = np.unique(np.linspace(0, config.class_num - 1, MAX_CLASSES).round().astype(np.int64))
        self.labels = torch.from_numpy(shown.repeat(IMAGES_PER_CLASS))
        count = len(self.labels)
        evaluation.sampling.check_top_k(config.vocab_size)
        orders = evaluation.orders.for_grid(config.grid_size, evaluation.seed, count)
        self.group_sizes = orders.group_sizes
        self.orders = torch.from_numpy(orders.of_images(np.arange(count)).astype(np.int64))
        self.seeds = image_seeds(evaluation.seed, torch.arange(count))

    def __call__(self, model: LPD) -> Image.Image | None:
        """Draw the picture; called by all processes, of which each makes a share and rank 0 gets the whole."""
        mine = torch.arange(self.dist.rank, len(self.labels), self.dist.world_size)
        drawn = dict(zip(mine.tolist(), self._draw(model, mine) if len(mine) else (), strict=True))
        parts = self.dist.gather(drawn)
        if not self.dist.is_main:
            return None
        drawn = {index: image for part in parts for index, image in part.items()}
        texts = [self.classes[label] if self.classes else f"class {label}" for label in self.labels.tolist()]
        return image_grid(np.stack([drawn[index] for index in range(len(texts))]), IMAGES_PER_CLASS, texts)

    def _draw(self, model: LPD, rows: torch.Tensor) -> np.ndarray:
        """Images uint8 (B, H, W, 3)."""
        training, evaluation = model.training, self.evaluation
        model.eval()
        images = generate_images(
            model, self.tokenizer, self.labels[rows], self.orders[rows], self.group_sizes, evaluation.sampling,
            self.seeds[rows], evaluation.bf16,
        )  # fmt: skip
        model.train(training)
        return images.cpu().numpy()
