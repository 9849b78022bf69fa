"""How images are scored: the settings that evaluation, training with evaluation, and the commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.scoring.features import INCEPTION, inception_cache
from util.config import setting
from util.errors import UserError


def _extractor_name(text: str) -> str | None:
    return None if text == "none" else text


@dataclass(frozen=True)
class ScoringConfig:
    """The feature extractor and what its features are compared with.

    ``feature_extractor`` is ``inception-v3-compat``, the path of a classifier file, or None: images without scores.
    """

    feature_extractor: str | None = setting(
        INCEPTION, f"{INCEPTION}, a file of python -m engine.classifier, or none", parse=_extractor_name
    )
    inception_path: Path | None = setting(None, "Inception weights (default: torch's hub cache, downloaded if missing)")
    reference_statistics: Path | None = setting(None, "npz with mu and sigma; without it no Fréchet distance (FID)")
    adm_suite: bool = setting(False, "sFID, precision and recall too, where the reference holds its images")

    def __post_init__(self) -> None:
        if self.feature_extractor is None and self.reference_statistics is not None:
            raise UserError(
                f"--reference_statistics {self.reference_statistics} can't be used without a feature extractor."
            )
        if self.adm_suite and (self.feature_extractor != INCEPTION or self.reference_statistics is None):
            raise UserError(f"--adm_suite needs the feature extractor {INCEPTION} and --reference_statistics.")

    @property
    def needs_download(self) -> bool:
        """Whether Inception has to be downloaded before anything is scored."""
        wanted = self.feature_extractor == INCEPTION and self.inception_path is None
        return wanted and not inception_cache().is_file()
