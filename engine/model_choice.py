"""Which model a run has: what its flags ask for, what its checkpoint records, and what tokenizer and data need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import MODEL_SIZES, model_config
from models.lpd import LPDConfig, Regularisation
from util.checkpoint import load_checkpoint
from util.config import MAX_COUNT, MAX_SIDE, check, part, setting
from util.errors import UserError


def _sizes() -> str:
    """What the named sizes are."""
    return ", ".join(
        f"{name} {depth}×{width} ({12 * depth * width**2 / 1e6:.4g}M)"
        for name, (width, depth, _) in MODEL_SIZES.items()
    )


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """What the flags say; None leaves it to the checkpoint or the data."""

    model: str | None = setting(
        None,
        f"size, in layers × width and weights of the layers: {_sizes()}; codes and classes add theirs (default: lpd_l)",
        choices=tuple(MODEL_SIZES),
    )
    img_size: int | None = setting(
        None,
        "pixels; a multiple of the tokenizer's stride (default: the code cache's or the tokenizer's, else 256)",
        at_least=1,
        at_most=MAX_SIDE,
    )
    class_num: int | None = setting(
        None, "number of classes (default: the data set's; 1000 without one)", at_least=1, at_most=MAX_COUNT
    )
    new_classes: bool = setting(False, "fine-tune --pretrained_ckpt on other classes: a new class table")
    regularisation: Regularisation = part(default_factory=Regularisation)

    def __post_init__(self) -> None:
        check(self)

    def resolve(
        self,
        recorded: Mapping[str, Any] | None,
        stride: int,
        vocab_size: int,
        class_num: int | None = None,
        resizable: bool = False,
    ) -> LPDConfig:
        """The model's configuration: what the checkpoint records, else the flags, else defaults.

        Args:
            recorded: `config` of a checkpoint, or None where it records none.
            stride, vocab_size: the tokenizer's.
            class_num: the data set's, or None where there is no data set.
            resizable: whether --img_size may differ from the checkpoint's, as where a new training starts from it:
                positions are resized then.

        Raises:
            UserError: where a flag or the tokenizer contradicts the checkpoint.
        """
        if recorded is None:
            return self._new(stride, vocab_size, class_num)
        if recorded.keys() != LPDConfig.__dataclass_fields__.keys():
            raise UserError("the checkpoint is not one of an LPD model: its 'config' does not describe one.")
        values = dict(recorded)
        if resizable and self.img_size is not None:
            values["img_size"] = self.img_size
        if resizable and self.new_classes and class_num is not None:
            values["class_num"] = class_num if self.class_num is None else self.class_num
        self._require_same(values, stride, vocab_size)
        if class_num is not None and values["class_num"] < class_num:
            raise UserError(f"the checkpoint has {values['class_num']} classes, but the data set has {class_num}.")
        return LPDConfig(**values | vars(self.regularisation))

    def _new(self, stride: int, vocab_size: int, class_num: int | None) -> LPDConfig:
        classes = next(count for count in (self.class_num, class_num, 1000) if count is not None)
        config = model_config(
            self.model or "lpd_l",
            img_size=256 if self.img_size is None else self.img_size,
            stride=stride,
            vocab_size=vocab_size,
            class_num=classes,
            **vars(self.regularisation),
        )
        if class_num is not None and classes < class_num:
            raise UserError(f"--class_num is {classes}, but the data set has {class_num} classes.")
        return config

    def _require_same(self, values: Mapping[str, Any], stride: int, vocab_size: int) -> None:
        """Raise UserError where a checkpoint's `values` are not what the flags and the tokenizer say."""
        wanted: list[tuple[str, int | None, str]] = [
            ("stride", stride, "the tokenizer"),
            ("vocab_size", vocab_size, "the tokenizer"),
            ("img_size", self.img_size, "--img_size"),
            ("class_num", self.class_num, "--class_num"),
        ]
        if self.model is not None:
            sizes = zip(("embed_dim", "depth", "num_heads"), MODEL_SIZES[self.model], strict=True)
            wanted += [(name, size, f"--model {self.model}") for name, size in sizes]
        for name, value, source in wanted:
            if value is not None and values[name] != value:
                raise UserError(f"the checkpoint is of a model with {name} {values[name]}, but {source} says {value}.")


def recorded_config(content: Mapping[str, Any], source: Path) -> LPDConfig | None:
    """The configuration that a checkpoint records, or None; UserError for one of something other than an LPD model."""
    config = content.get("config")
    if config is None:
        return None
    if not isinstance(config, dict) or config.keys() != LPDConfig.__dataclass_fields__.keys():
        raise UserError(f"{source} is not a checkpoint of an LPD model: its 'config' does not describe one.")
    return LPDConfig(**config)


def load_pretrained(path: Path, use_ema: bool) -> dict[str, Any]:
    """A checkpoint; with `use_ema`, the moving average takes the place of its weights."""
    checkpoint = load_checkpoint(path)
    if use_ema:
        if "model_ema" not in checkpoint:
            raise UserError(f"{path} holds no moving average of the weights; leave out --use_ema.")
        checkpoint["model"] = checkpoint.pop("model_ema")
    return checkpoint


def check_tokenizer(checkpoint: dict[str, Any], source: Path, tokenizer_sha256: str | None) -> None:
    """Refuse codes of another tokenizer than those the checkpoint was trained on, where both are known."""
    trained_with = checkpoint.get("tokenizer_sha256")
    if trained_with is not None and tokenizer_sha256 is not None and trained_with != tokenizer_sha256:
        raise UserError(
            f"{source} was trained on codes of another tokenizer (SHA-256 {trained_with[:12]}…) than the one given "
            f"({tokenizer_sha256[:12]}…)."
        )
