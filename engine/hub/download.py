"""The published files that recipes need: what each is, where it comes from and where it belongs."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.hub.export import check_state
from engine.hub.remote import choose_weights, fetch, find_named, list_files
from engine.recipes import RELEASED, TOKENIZER, checkpoint_path
from engine.scoring.features import download_inception
from models import model_config
from orders import load_orders
from tokenizers import load_tokenizer
from util.checkpoint import load_checkpoint
from util.errors import UserError

logger = logging.getLogger(__name__)

ORDERS_REPO, ORDERS_DIR = "mit-han-lab/lpd_orders", Path("orders/lpd_orders_generated")
PUBLISHED_ORDERS = re.compile(r"res(\d+)_steps\d+_repulsion\d+\.json")
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
    check: Callable[[Path], object]  # raises UserError for another file


def _check_model(model: str, img_size: int, path: Path) -> None:
    check_state(load_checkpoint(path)["model"], model_config(model, img_size=img_size), str(path))


def _released(model: str, img_size: int) -> Download:
    check = functools.partial(_check_model, model, img_size)
    repo, place = f"mit-han-lab/{model}_{img_size}", Path(checkpoint_path(model, img_size))
    return Download("the file of LPD weights", repo, None, place, check)


_NAME = "vq_ds16_c2i.pt"
DOWNLOADS = {f"{model}_{size}": _released(model, size) for model, size in RELEASED}
DOWNLOADS["vq_ds16_c2i"] = Download(
    f"the tokenizer {_NAME}", "FoundationVision/LlamaGen", _NAME, Path(TOKENIZER), load_tokenizer
)
NAMES = (*DOWNLOADS, "orders", "inception")


def download(name: str) -> None:
    """Get what ``name``, one of NAMES, stands for to the place where the recipes look for it; what is there is checked.

    Raises:
        UserError: if it can't be downloaded, or is not what it should be. The message says how to get it by hand.
    """
    if name == "inception":
        logger.info("Inception weights are at %s", download_inception())
        return
    by_hand = f"put the files of https://huggingface.co/{ORDERS_REPO} into {ORDERS_DIR}"
    try:
        if name == "orders":
            _download_orders()
        else:
            wanted = DOWNLOADS[name]
            by_hand = f"put {wanted.what} of https://huggingface.co/{wanted.repo} at {wanted.place}"
            files = {file.name: file for file in list_files(wanted.repo)}
            file = find_named(files, wanted.name or choose_weights(list(files), wanted.repo), wanted.repo)
            fetch(file, wanted.place.with_suffix(Path(file.name).suffix), wanted.check)
    except UserError as error:
        raise UserError(f"{name}: {str(error).rstrip('.')}. By hand: {by_hand}.") from None


def _download_orders() -> None:
    files = list_files(ORDERS_REPO, ("model", "dataset"))
    found = [(file, match) for file in files if (match := PUBLISHED_ORDERS.fullmatch(Path(file.name).name))]
    if not found:
        raise UserError(f"{ORDERS_REPO} holds no files of orders (res256_steps20_repulsion2.json …).")
    for file, match in found:
        fetch(file, ORDERS_DIR / match[0], functools.partial(load_orders, grid_size=int(match[1]) // 16))


def download_all(names: list[str]) -> None:
    """Download one after the other. A failure does not stop the rest; it is a UserError at the end."""
    problems = []
    for name in dict.fromkeys(NAMES if "all" in names else names):
        try:
            download(name)
        except UserError as error:
            logger.error("%s", error)
            problems.append(name)
    if problems:
        raise UserError(f"not downloaded: {', '.join(problems)} (reasons above); run the same command to try again.")
