"""Which model a run has: what its flags ask for, what a checkpoint records, and what tokenizer and data need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models import MODEL_SIZES, model_config
from models.lpd import LPDConfig, Regularisation
from util.config import check, part, setting
from util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """What the flags say; None leaves it to the checkpoint or the data."""

    model: str | None = setting(None, "size (default: lpd_l)", choices=tuple(MODEL_SIZES))
    img_size: int | None = setting(
        None, "pixels; a multiple of the tokenizer's stride (default: the code cache's, else 256)"
    )
    class_num: int | None = setting(None, "number of classes (default: the data set's; 1000 without one)")
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
