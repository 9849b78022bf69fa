"""Pictures of the same samples, drawn again and again while a model is trained."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from PIL import Image

from engine.evaluation.evaluate import EvalConfig, image_seeds, prepare
from engine.generate import generate
from models.lpd import LPD, LPDConfig
from orders import generate_orders
from tokenizers import VQModel
from util.dist import Dist
from util.pictures import image_grid, to_uint8

MAX_CLASSES, IMAGES_PER_CLASS = 8, 4


class SampleGrid:
    """One row for each of up to 8 classes, spread over all, with 4 images; classes, orders and noise never change.

    Args:
        settings: how to sample and to draw orders; what concerns scores doesn't matter.

    Raises:
        UserError: for settings that don't fit the model.
    """

    def __init__(self, config: LPDConfig, tokenizer: VQModel, settings: EvalConfig, dist: Dist) -> None:
        self.tokenizer, self.dist = tokenizer, dist
        classes = np.unique(np.linspace(0, config.class_num - 1, MAX_CLASSES).round().astype(np.int64))
        self.labels = torch.from_numpy(classes.repeat(IMAGES_PER_CLASS))
        count = len(self.labels)
        self.settings = dataclasses.replace(
            settings, num_images=count, feature_extractor=None, reference_statistics=None, adm_suite=False
        )
        orders = prepare(self.settings, config, dist).orders
        if orders is None:
            s = self.settings
            orders = generate_orders(
                s.order, count, s.group_sizes, config.grid_size, s.proximity_threshold, s.repulsion_threshold, s.seed
            )
        self.orders = torch.from_numpy(orders[:count].astype(np.int64))
        self.seeds = image_seeds(self.settings.seed, torch.arange(count))

    def __call__(self, model: LPD) -> Image.Image | None:
        """Draw the picture; called by all processes, of which each makes a share and rank 0 gets the whole."""
        mine = torch.arange(self.dist.rank, len(self.labels), self.dist.world_size)
        drawn = dict(zip(mine.tolist(), self._draw(model, mine) if len(mine) else (), strict=True))
        parts = self.dist.gather(drawn)
        if not self.dist.is_main:
            return None
        drawn = {index: image for part in parts for index, image in part.items()}
        names = self.settings.classes
        texts = [names[label] if names else f"class {label}" for label in self.labels.tolist()]
        return image_grid(np.stack([drawn[index] for index in range(len(texts))]), IMAGES_PER_CLASS, texts)

    @torch.no_grad()
    def _draw(self, model: LPD, rows: torch.Tensor) -> np.ndarray:
        """Images uint8 (B, H, W, 3)."""
        settings, device = self.settings, self.dist.device
        training = model.training
        model.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            tokens = generate(
                model,
                self.labels[rows].to(device),
                self.orders[rows].to(device),
                settings.group_sizes,
                cfg=settings.cfg,
                cfg_schedule=settings.cfg_schedule,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seeds=self.seeds[rows].to(device),
            )
            images = to_uint8(self.tokenizer.decode(tokens))
        model.train(training)
        return images.cpu().numpy()
