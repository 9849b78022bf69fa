"""The published files, to the places where the recipes look for them."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

from engine.hub.export import check_state
from engine.hub.published import DOWNLOADS, ORDERS_DIR, ORDERS_REPO, Download
from engine.hub.remote import RemoteFile, choose_weights, fetch, list_files
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
        UserError: if it can't be had, or is not what it should be.
    """
    if name == "inception":
        logger.info("Inception weights are at %s", download_inception())
    elif name == "orders":
        _download_orders()
    else:
        _download_file(name, DOWNLOADS[name])


def _download_file(name: str, wanted: Download) -> None:
    try:
        files = {file.name: file for file in list_files(wanted.repo)}
        chosen = wanted.name or choose_weights(list(files), wanted.repo)
        if chosen not in files:
            raise UserError(f"{wanted.repo} has no file {chosen}; it holds {', '.join(files) or 'nothing'}.")
        place = wanted.place.with_suffix(Path(chosen).suffix)
        fetch(files[chosen], place, lambda path: _check_weights(name, path))
    except UserError as error:
        raise UserError(
            f"{name}: {str(error).rstrip('.')}. By hand: put {wanted.what} of https://huggingface.co/{wanted.repo} at "
            f"{wanted.place}."
        ) from None


def _check_weights(name: str, path: Path) -> None:
    """Raise UserError unless a file holds the tokenizer, or a model of the published size."""
    if name not in {f"{model}_{size}" for model, size in RELEASED}:
        load_tokenizer(path)
        return
    model, size = name.rsplit("_", 1)
    check_state(load_checkpoint(path)["model"], model_config(model, img_size=int(size)), str(path))


def _download_orders() -> None:
    try:
        files: list[tuple[RemoteFile, re.Match[str]]] = [
            (file, match)
            for file in list_files(ORDERS_REPO, ("model", "dataset"))
            if (match := PUBLISHED_ORDERS.fullmatch(Path(file.name).name))
        ]
        if not files:
            raise UserError(f"{ORDERS_REPO} holds no files of orders (res256_steps20_repulsion2.json …).")
        for file, match in files:
            fetch(file, ORDERS_DIR / match[0], functools.partial(load_orders, grid_size=int(match[1]) // 16))
    except UserError as error:
        raise UserError(
            f"orders: {str(error).rstrip('.')}. By hand: put the files of https://huggingface.co/{ORDERS_REPO} into "
            f"{ORDERS_DIR}."
        ) from None


def download_all(names: list[str]) -> None:
    """Download one after the other; what fails does not keep the rest from coming. UserError at the end if any did."""
    problems = []
    for name in dict.fromkeys(NAMES if "all" in names else names):
        try:
            download(name)
        except UserError as error:
            logger.error("%s", error)
            problems.append(name)
    if problems:
        raise UserError(f"not downloaded: {', '.join(problems)} (reasons above); the same command tries again.")
