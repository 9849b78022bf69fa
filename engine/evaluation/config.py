"""What an evaluation makes, how it scores it and what it writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engine.decoding.decoder import DECODE_PATHS
from engine.run_config import RunConfig
from engine.scoring.config import ScoringConfig
from engine.scoring.metrics import NEIGHBOURS
from models.sampling import Sampling
from orders.config import OrderConfig
from util.config import check, part, setting
from util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RunConfig):
    """An evaluation, whatever the model.

    Raises:
        UserError: for settings out of range, or that contradict each other.
    """

    num_images: int = setting(50_000, "balanced over the classes", at_least=1)
    eval_bsz: int = setting(64, "images per process and batch", at_least=1)
    decode_path: str = setting("auto", "see engine/decoding/decoder.py; plain switches it off", choices=DECODE_PATHS)
    speed_runs: int = setting(0, "time batches of 1 and 64 so many times; the paper: 500; 0: not", at_least=0)
    save_images: bool = setting(False, "keep the images as PNG files")
    save_npz: bool = setting(False, "write samples.npz for the ADM evaluation suite")
    orders: OrderConfig = part(default_factory=OrderConfig)
    sampling: Sampling = part(default_factory=Sampling)
    scoring: ScoringConfig = part(default_factory=ScoringConfig)

    def __post_init__(self) -> None:
        check(self)
        if self.scoring.adm_suite and self.num_images <= NEIGHBOURS:
            raise UserError(f"--adm_suite needs more images than --num_images {self.num_images}.")

    def for_epoch(self, epoch: int) -> EvalConfig:
        """The same evaluation with results in a folder of this epoch's own."""
        return dataclasses.replace(self, output_dir=self.output_dir / f"eval_epoch{epoch:04}")
