"""What training and evaluation have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from util.config import setting


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, what its random numbers follow from, and its precision."""

    output_dir: Path = setting(Path("runs/lpd"), "checkpoints, metrics, results, pictures")
    seed: int = setting(
        0, "of weights, data order, orders, dropout; of the images in an evaluation", at_least=0, below=2**63
    )
    bf16: bool = setting(False, "bfloat16 autocast")
