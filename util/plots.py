"""Plots of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_loss(lines: Sequence[dict[str, Any]], path: Path, vocab_size: int | None = None) -> None:
    """Draw the training loss over the epochs.

    Args:
        lines: of `metrics.jsonl`, with `epoch` and `loss`.
        vocab_size: number of codes; a line then shows ln V, the loss of guessing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axis.plot([line["epoch"] for line in lines], [line["loss"] for line in lines])
    if vocab_size is not None:
        axis.axhline(math.log(vocab_size), color="grey", linestyle=":")
        text = f"ln {vocab_size}: guessing"
        place = ("axes fraction", "data")
        axis.annotate(text, (1, math.log(vocab_size)), (-4, -4), place, "offset points", ha="right", va="top")
    axis.set_xlabel("epoch")
    axis.set_ylabel("cross-entropy per token, nats")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
