"""Are the samples copies? The training photos nearest to them, in pixels and in the classifier's features."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.scoring.features import FeatureExtractor, load_feature_extractor
from experiments.cells import Model, Scale, classifier_path, file_hashes, load_model
from util.data.images import open_images
from util.data.loading import load_all
from util.dist import Dist
from util.pictures import image_grid, save_png

SHOWN = 12  # classes in the picture
SPACES = ("pixels", "features")


def measure_neighbours(
    out: Path, scale: Scale, model: Model, cfg: float, splits: tuple[str, str], dist: Dist, picture: Path | None
) -> dict[str, Any]:
    """Distances of samples (locality-aware, ``scale.tuning_steps`` steps) to the nearest training photo.

    Args:
        splits: training photos, and photos that are not trained on, whose distances stand beside.
        picture: where samples are drawn above their nearest training photos.

    Returns:
        Plain data: by space (``pixels``: root mean square of grey levels; ``features``: Euclidean) the median distance
        of ``samples`` and of ``held_out`` photos, and ``nearer``, the share of samples that are nearer to a training
        photo than all but 5 % of the held-out photos are; and what it was measured with.
    """
    (train, _), (held_out, _) = (load_all(open_images(path, scale.img_size)) for path in splits)
    generator = load_model(out, scale, model, dist.device)
    labels = np.arange(scale.tuning_images) * generator.model.config.class_num // scale.tuning_images
    drawn = generator(labels.tolist(), scale.tuning_steps, seed=scale.seeds[0], cfg=cfg)
    samples = torch.from_numpy(np.stack([np.asarray(image) for image in drawn]))
    extractor = load_feature_extractor(str(classifier_path(out)), dist.device)
    results: dict[str, Any] = {"num_samples": len(samples), "cfg": cfg, **asdict(model), **file_hashes(out, model)}
    nearest = []
    for space in SPACES:
        vectors = [_vectors(space, photos, extractor, dist.device) for photos in (samples, held_out, train)]
        (distances, numbers), (others, _) = (torch.cdist(part, vectors[2]).min(1) for part in vectors[:2])
        results[space] = {
            "samples": float(distances.median()),
            "held_out": float(others.median()),
            "nearer": float((distances < others.quantile(0.05)).double().mean()),
        }
        nearest.append(train[numbers])
    if picture is not None:
        classes = np.linspace(0, labels.max(), min(SHOWN, labels.max() + 1)).round().astype(int)
        chosen = np.searchsorted(labels, classes)
        names = [str(number) if generator.classes is None else generator.classes[number] for number in classes]
        rows = torch.cat([part[chosen] for part in (samples, *nearest)])
        titles = ("samples", *(f"nearest in {space}" for space in SPACES))
        save_png(image_grid(rows, len(chosen), [*names, *[""] * (2 * len(names))], row_titles=titles), picture)
    return results


def _vectors(space: str, photos: torch.Tensor, extractor: FeatureExtractor, device: torch.device) -> torch.Tensor:
    """Photos uint8 (N, H, W, 3) as points (N, d), float32, on the CPU."""
    if space == "pixels":
        return photos.flatten(1).float() / photos[0].numel() ** 0.5
    batches = photos.permute(0, 3, 1, 2).split(250)
    return torch.cat([extractor(batch.to(device))[0].cpu() for batch in batches])
