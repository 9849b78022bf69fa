"""The loss on images that a model is not trained on, measured the same way every time.

Shape legend: `B` images of a chunk, `L` tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from engine.training.batch import codes_of, draw_samples
from engine.training.step import TrainingPass
from models.lpd import LPD
from tokenizers import VQModel
from util.data.codes import CodeDataset
from util.data.images import ImageDataset
from util.data.loading import load_batches
from util.dist import Dist

# Not the run's: runs of other seeds are measured on the same orders.
SEED = 0x76616C
LOSSES = ("val_loss", "val_loss_ema")
NOTICEABLE = 0.01  # nats per token: of one model against another on the same images and orders
CHUNK = 32  # images that share a schedule of group sizes


def what_limits(lines: Sequence[Mapping[str, float]]) -> str | None:
    """What a finished training's validation losses say about its length; None if nothing.

    Args:
        lines: of metrics.jsonl with ``epoch``, and with ``val_loss`` where it was measured; ``val_loss_ema`` counts
            where there is one.
    """
    measured = [line for line in lines if all(map(_is_loss, (line.get(name, 0.0) for name in LOSSES)))]
    plain = {line["epoch"]: line["val_loss"] for line in measured if "val_loss" in line}
    losses = {line["epoch"]: line.get("val_loss_ema", line["val_loss"]) for line in measured if "val_loss" in line}
    if len(losses) < 2:
        return None
    end, best = max(losses), min(losses, key=losses.__getitem__)
    if losses[end] > losses[best] + NOTICEABLE:
        return (
            f"the validation loss was least after epoch {best:g}, {losses[best]:.3f}, and is {losses[end]:.3f} now: "
            "the model learns its images by heart; fewer --epochs, a smaller --model or more images help"
        )
    since = max((epoch for epoch in losses if end / 2 <= epoch <= end * 2 / 3), default=end)
    learnt_by_heart = plain[end] > min(plain.values()) + NOTICEABLE  # an average lags behind
    if losses[end] < losses[since] - NOTICEABLE and not learnt_by_heart:
        return (
            f"the validation loss was still falling, by {losses[since] - losses[end]:.3f} since epoch {since:g}: more "
            "--epochs in another --output_dir may make a better model"
        )
    return None


def _is_loss(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


class Validation:
    """Mean cross-entropy of all tokens of a validation set, given their classes, nothing dropped and nothing mirrored.

    Orders and schedules follow from the image's number alone, so that two measurements differ by the model only,
    whatever the number of processes. The codes are read, or images encoded, once and held in memory.

    Args:
        dataset: with the classes of the model, by label.
        schedules: group sizes to draw from, each summing to L.
        tokenizer: encodes images; not needed for codes.
        num_workers: processes that load images.
    """

    def __init__(
        self,
        dataset: CodeDataset | ImageDataset,
        schedules: Sequence[Sequence[int]],
        dist: Dist,
        *,
        tokenizer: VQModel | None = None,
        bf16: bool = False,
        num_workers: int = 0,
    ) -> None:
        self._schedules, self._dist, self._bf16, self._count = schedules, dist, bf16, len(dataset)
        self._starts = range(dist.rank * CHUNK, len(dataset), dist.world_size * CHUNK)
        batches = [list(range(start, min(start + CHUNK, len(dataset)))) for start in self._starts]
        encoder = None if isinstance(dataset, CodeDataset) else tokenizer
        self._chunks: list[tuple[torch.Tensor, torch.Tensor]] = []  # codes (B, L), labels (B,)
        for *data, labels in load_batches(dataset, batches, num_workers, dist.device):
            plain = torch.zeros(len(labels), dtype=torch.bool, device=dist.device)
            self._chunks.append((codes_of(data, plain, encoder).to("cpu", torch.int32), labels.cpu()))

    @torch.no_grad()
    def __call__(self, model: LPD) -> float:
        """The loss of a model, which is not sharded; called by all processes, each gets the same.

        Raises:
            FloatingPointError: on all processes, if the loss is not finite.
        """
        device, training = self._dist.device, model.training
        net = TrainingPass(model, "sdpa", fused=False).eval()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start, (codes, labels) in zip(self._starts, self._chunks, strict=True):
            rows = range(start, start + len(labels))
            orders, _, no_drop = draw_samples(SEED, 0, rows, codes.shape[1], 0.0, 0.0, device)
            drawn = int(np.random.default_rng([SEED, start]).integers(len(self._schedules)))
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                loss = net(codes.to(device).long(), labels.to(device), orders, no_drop, self._schedules[drawn])
            total += loss.double() * len(labels)
        model.train(training)
        mean = self._dist.sum_(total).item() / self._count
        if not math.isfinite(mean):
            raise FloatingPointError("the validation loss is not finite; nothing was saved since the last checkpoint.")
        return mean
