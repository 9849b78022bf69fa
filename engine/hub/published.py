"""The files that the published recipes need: what each is, where it comes from and where it belongs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.recipes import RELEASED, TOKENIZER, checkpoint_path

ORDERS_REPO, ORDERS_DIR = "mit-han-lab/lpd_orders", Path("orders/lpd_orders_generated")
GUIDED_DIFFUSION = "https://github.com/openai/guided-diffusion/tree/main/evaluations"
OPENAI_STATISTICS = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
COMMAND = "python -m engine.hub download"


@dataclass(frozen=True)
class Download:
    """One file of a hub repository, and the place where the recipes look for it."""

    what: str
    repo: str
    name: str | None  # in the repository; None: its only file of weights
    place: Path


DOWNLOADS = {
    f"{model}_{size}": Download(
        "the file of LPD weights", f"mit-han-lab/{model}_{size}", None, Path(checkpoint_path(model, size))
    )
    for model, size in RELEASED
} | {
    "vq_ds16_c2i": Download(
        "the tokenizer vq_ds16_c2i.pt", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt", Path(TOKENIZER)
    )
}
