"""All that a command line of main_lpd.py says, in one configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.evaluation.config import EvalConfig
from engine.model_choice import ModelChoice
from engine.recipes import EVAL_RECIPES, TRAIN_RECIPES
from engine.training.config import DataConfig, TrainConfig
from util.config import MAX_WORKERS, check, part, setting
from util.dist import DeviceConfig


@dataclass(frozen=True, kw_only=True)
class Config(DeviceConfig):
    """One run of main_lpd.py: a training, or an evaluation, for which `training` is None."""

    evaluate: bool = setting(False, "generate and score images instead of training")
    recipe: str | None = setting(
        None, f"a published run: {', '.join(TRAIN_RECIPES)}; with --evaluate {', '.join(EVAL_RECIPES)}"
    )
    vqgan_path: Path | None = setting(
        None,
        "tokenizer: LlamaGen's or one of tokenizers.train; a file, or user/model on the hub (default: that of "
        "--pretrained_ckpt, where it is an exported folder)",
    )
    pretrained_ckpt: Path | None = setting(
        None, "weights to evaluate or start from: a file, an exported folder, or user/model on the hub"
    )
    use_ema: bool = setting(False, "take --pretrained_ckpt's moving average of the weights (see --ema)")
    threads: int | None = setting(
        None, "of the CPU, per process (default: torch's, one per core)", at_least=1, at_most=MAX_WORKERS
    )
    dry_run: bool = setting(
        False, "check everything, print the configuration and stop; nothing is written or downloaded"
    )
    model: ModelChoice = part("model", "size, pixels and classes come from the checkpoint where it records them")
    data: DataConfig = part("data")
    training: TrainConfig | None = part("training")
    evaluation: EvalConfig = part("generation and scores")

    def __post_init__(self) -> None:
        check(self)

    @property
    def output_dir(self) -> Path:
        return self.evaluation.output_dir

    @property
    def seed(self) -> int:
        return self.evaluation.seed
