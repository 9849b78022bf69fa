"""The published files, to the places where the recipes look for them."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

from engine.hub.export import check_state
from engine.hub.published import DOWNLOADS, ORDERS_DIR, ORDERS_REPO, Download
from engine.hub.remote import choose_weights, fetch, find_named, list_files
from engine.recipes import RELEASED
from engine.scoring.features import download_inception
from models import model_config
from orders import load_orders
from tokenizers import load_tokenizer
from util.checkpoint import load_checkpoint
from util.errors import UserError

logger = logging.getLogger(__name__)

PUBLISHED_ORDERS = re.compile(r"res(\d+)_steps\d+_repulsion\d+\.json")
OTHERS = ("orders", "inception")
NAMES = (*DOWNLOADS, *OTHERS)


def download(name: str) -> None:
    """Get what ``name``, one of NAMES, stands for to the place where the recipes look for it; what is there is checked.

    Raises:
        UserError: if it can't be downloaded, or is not what it should be. The message says how to get it by hand.
    """
    if name == "inception":
        logger.info("Inception weights are at %s", download_inception())
        return
    try:
        if name == "orders":
            what, repo, place = "the files", ORDERS_REPO, f"into {ORDERS_DIR}"
            _download_orders()
        else:
            wanted = DOWNLOADS[name]
            what, repo, place = wanted.what, wanted.repo, f"at {wanted.place}"
            _download_weights(name, wanted)
    except UserError as error:
        by_hand = f"put {what} of https://huggingface.co/{repo} {place}"
        raise UserError(f"{name}: {str(error).rstrip('.')}. By hand: {by_hand}.") from None


def _download_weights(name: str, wanted: Download) -> None:
    files = {file.name: file for file in list_files(wanted.repo)}
    file = find_named(files, wanted.name or choose_weights(list(files), wanted.repo), wanted.repo)
    fetch(file, wanted.place.with_suffix(Path(file.name).suffix), lambda path: _check_weights(name, path))


def _check_weights(name: str, path: Path) -> None:
    """Raise UserError unless a file holds the tokenizer, or a model of the published size."""
    if name not in {f"{model}_{size}" for model, size in RELEASED}:
        load_tokenizer(path)
        return
    model, size = name.rsplit("_", 1)
    check_state(load_checkpoint(path)["model"], model_config(model, img_size=int(size)), str(path))


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
