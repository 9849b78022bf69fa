"""``python -m engine.hub``: get the published files, and share a trained model on the Hugging Face hub.

    python -m engine.hub download lpd_l_256 vq_ds16_c2i inception
    python -m engine.hub export runs/mine/checkpoint-last.pth exported --vqgan_path runs/tokenizer/tokenizer.pt
    python -m engine.hub push exported user/model

An exported model is a folder with `model.safetensors`, `config.json` and a model card; `--pretrained_ckpt` takes the
folder, or the name it was pushed under.
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import HfApi

from engine.features import download_inception
from engine.recipes import RELEASED
from engine.required_files import DOWNLOADS, ORDERS_DIR, ORDERS_REPO, Download
from models import model_config
from models.lpd import LPD, LPDConfig, load_weights
from orders import load_orders
from orders.schedule import default_steps
from tokenizers import load_tokenizer
from util.checkpoint import load_checkpoint
from util.errors import UserError, exit_on_user_error
from util.exported import CONFIG, FORMAT, FORMAT_VERSION, MODEL
from util.files import atomic_write, sha256, write_json
from util.help import HelpFormatter
from util.hub import TOKENIZERS, RemoteFile, choose_weights, fetch, find_file, hub_errors, list_files
from util.logger import setup_logging

logger = logging.getLogger(__name__)

CARD = "README.md"
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
    _check_state(load_checkpoint(path)["model"], model_config(model, img_size=int(size)), str(path))


def _check_state(state: dict[str, torch.Tensor], config: LPDConfig, source: str) -> None:
    """Raise UserError unless names and shapes are those of the model."""
    with torch.device("meta"):
        load_weights(LPD(config), {key: value.to("meta") for key, value in state.items()}, source)


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


def export(checkpoint: Path, folder: Path, *, ema: bool = False, vqgan_path: Path | None = None) -> None:
    """Write a checkpoint as `model.safetensors`, `config.json` and a model card, and the tokenizer beside them.

    Args:
        ema: take the moving average of the weights (`model_ema`) instead of the last ones.
        vqgan_path: tokenizer to copy, the one that the model was trained with.

    Raises:
        UserError: for a checkpoint without configuration or average, a tokenizer of another model, or a folder that
            holds something else.
    """
    content = load_checkpoint(checkpoint)
    config = _recorded_config(content, checkpoint)
    state = content["model"]
    if ema:
        state = content.get("model_ema")
        if state is None:
            raise UserError(f"{checkpoint} holds no moving average of its weights; leave out --ema.")
    _check_state(state, config, str(checkpoint))
    described: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": vars(config)}
    described |= {key: content.get(key) for key in ("classes", "tokenizer_sha256")}
    if vqgan_path is not None:
        load_tokenizer(vqgan_path)
        given, trained_with = sha256(vqgan_path), described["tokenizer_sha256"]
        if trained_with not in (None, given):
            raise UserError(f"{checkpoint} was trained with another tokenizer than {vqgan_path} (SHA-256 differs).")
        described["tokenizer_sha256"] = given
    kept = {MODEL, CONFIG, CARD, *TOKENIZERS}
    strangers = sorted({path.name for path in folder.iterdir()} - kept) if folder.exists() else []
    if strangers:
        raise UserError(f"{folder} holds {strangers[0]!r}, which no export wrote; choose another folder.")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with atomic_write(folder / MODEL) as file:
        safetensors.torch.save_file(tensors, file.name, metadata={"format": "pt"})
    for name in TOKENIZERS:
        if vqgan_path is None or (name == TOKENIZERS[0]) == (vqgan_path.suffix == ".safetensors"):
            (folder / name).unlink(missing_ok=True)  # of an earlier export
            continue
        with atomic_write(folder / name) as file, open(vqgan_path, "rb") as source:
            shutil.copyfileobj(source, file)
    write_json(folder / CONFIG, described)
    with atomic_write(folder / CARD) as file:
        file.write(_model_card(folder.name, config, described, vqgan_path is not None).encode())
    logger.info("%s: %d tensors, %s", folder, len(tensors), "averaged weights" if ema else "weights")


def _recorded_config(content: dict[str, Any], source: Path) -> LPDConfig:
    config = content.get("config")
    if not isinstance(config, dict) or config.keys() != LPDConfig.__dataclass_fields__.keys():
        raise UserError(f"{source} records no configuration of an LPD model, so it can't be exported.")
    return LPDConfig(**config)


def _model_card(name: str, config: LPDConfig, described: dict[str, Any], has_tokenizer: bool) -> str:
    tokenizer = "NAME_OR_FOLDER" if has_tokenizer else "TOKENIZER"
    trained_with = described["tokenizer_sha256"]
    return f"""---
tags: [lpd, image-generation, class-conditional]
---
# {name}

A class-conditional image generator that decodes tokens in parallel, by the method of *Locality-aware Parallel Decoding*
([arXiv 2507.01957](https://arxiv.org/abs/2507.01957)).

| pixels | classes | width × depth | heads | codes | tokenizer's stride |
|---|---|---|---|---|---|
| {config.img_size} | {config.class_num} | {config.embed_dim} × {config.depth} | {config.num_heads} | \
{config.vocab_size} | {config.stride} |

Tokenizer: {f"SHA-256 `{trained_with}`" if trained_with else "not recorded"}\
{", in this repository" if has_tokenizer else ""}. Generate images:

```bash
python main_lpd.py --evaluate --pretrained_ckpt NAME_OR_FOLDER --vqgan_path {tokenizer} \\
    --generation_steps {default_steps((config.grid_size, config.grid_size))} --cfg 3 --num_images 100 \\
    --feature_extractor none --save_images --output_dir samples
```
"""


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload an exported folder to the hub as ``repo``, made if there is none; returns its URL.

    Raises:
        UserError: if the folder is no exported model, or the hub refuses it.
    """
    content = load_checkpoint(find_file(folder / MODEL))
    _check_state(content["model"], _recorded_config(content, folder / CONFIG), str(folder / MODEL))
    api = HfApi()
    with hub_errors(f"{repo} can't be uploaded; log in with hf auth login, or set HF_TOKEN to a token that may write"):
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=[MODEL, CONFIG, CARD, *TOKENIZERS],
            commit_message="LPD model",
        )
    return str(url)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.hub",
        description="Get the published files, and share a trained model on the Hugging Face hub.",
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("download", help="files for the recipes, to the places where these look for them")
    command.add_argument(
        "names", nargs="+", choices=("all", *NAMES), metavar="NAME", help=f"all (14 GB), or any of {', '.join(NAMES)}"
    )
    command = commands.add_parser(
        "export", help="checkpoint → folder of safetensors and JSON", formatter_class=HelpFormatter
    )
    command.add_argument("checkpoint", type=Path, help="checkpoint of a training run")
    command.add_argument("folder", type=Path, help="where to write model.safetensors, config.json and README.md")
    command.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the last")
    command.add_argument("--vqgan_path", type=Path, help="tokenizer to put beside it")
    command = commands.add_parser("push", help="exported folder → hub")
    command.add_argument("folder", type=Path, help="an exported folder")
    command.add_argument("repo", help="name on the hub: user/model")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    setup_logging()
    if args.command == "download":
        download_all(args.names)
    elif args.command == "export":
        export(args.checkpoint, args.folder, ema=args.ema, vqgan_path=args.vqgan_path)
    else:
        print(push(args.folder, args.repo, args.private))


if __name__ == "__main__":
    exit_on_user_error(main)
