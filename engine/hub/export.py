"""A trained model as a folder to share: written from a checkpoint, uploaded to the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from engine.hub.remote import TOKENIZERS, hub_errors
from engine.model_choice import recorded_config
from models.lpd import LPD, LPDConfig, load_weights
from orders.schedule import default_steps
from tokenizers import load_tokenizer, read_quality, save_tokenizer
from util.checkpoint import EXPORT_FORMAT, EXPORTED_CONFIG, EXPORTED_MODEL, load_checkpoint, save_safetensors
from util.errors import UserError
from util.files import atomic_write, check_output_dir, content_sha256, sha256, write_json
from util.folder_lock import LOCK_FILE, FolderLock
from util.readers import read_text
from util.shapes import shapes_only

logger = logging.getLogger(__name__)

CARD = "README.md"
FILES = {EXPORTED_MODEL, EXPORTED_CONFIG, CARD, *TOKENIZERS}  # of an exported folder


def export(
    checkpoint: Path,
    folder: Path,
    *,
    ema: bool = False,
    vqgan_path: Path | None = None,
    bf16: bool = False,
    notes: Path | None = None,
) -> None:
    """Write a checkpoint as `model.safetensors`, `config.json` and a model card, and the tokenizer beside them.

    Args:
        ema: take the moving average of the weights (`model_ema`), not the last weights.
        vqgan_path: tokenizer to copy, the one that the model was trained with.
        bf16: write both with half the bytes. Computing in float32 goes on as before, from rounded weights; the folder
            then holds a `tokenizer.safetensors` of its own hash.
        notes: Markdown for the model card: data, licence, training, scores, limits.

    Raises:
        UserError: for a checkpoint without configuration or average, a tokenizer of another model, notes that can't be
            read, or a folder that holds something else.
    """
    check_output_dir(folder)
    text = _read_notes(notes)
    content = load_checkpoint(checkpoint)
    config = _recorded_config(content, checkpoint)
    state = content.get("model_ema") if ema else content["model"]
    if state is None:
        raise UserError(f"{checkpoint} holds no moving average of its weights; leave out --ema.")
    check_state(state, config, str(checkpoint))
    trained_with, tokenizer = content.get("tokenizer_sha256"), None
    if vqgan_path is not None:
        loaded = load_tokenizer(vqgan_path)
        tokenizer = TOKENIZERS[1] if bf16 or vqgan_path.suffix == ".safetensors" else TOKENIZERS[0]
        given = sha256(vqgan_path)
        if trained_with not in (None, given):
            raise UserError(f"{checkpoint} was trained with another tokenizer than {vqgan_path} (SHA-256 differs).")
        trained_with = given
    with FolderLock(folder) as lock:
        lock.acquire()
        others = {path.name for path in folder.glob("*")} - FILES - {LOCK_FILE}
        if others:
            raise UserError(f"{folder} holds {min(others)!r}, which no export wrote; choose another folder.")
        tensors = {name: _narrowed(tensor, bf16).contiguous() for name, tensor in state.items()}
        save_safetensors(folder / EXPORTED_MODEL, tensors, {"format": "pt"})
        if vqgan_path is not None and tokenizer is not None:
            if bf16:
                save_tokenizer(loaded, folder / tokenizer, read_quality(vqgan_path), bf16=True)
                trained_with = sha256(folder / tokenizer)
            else:
                with atomic_write(folder / tokenizer) as file:
                    file.write(vqgan_path.read_bytes())
        for name in {*TOKENIZERS} - {tokenizer}:
            (folder / name).unlink(missing_ok=True)  # of an earlier export
        described = {"config": vars(config), "classes": content.get("classes"), "tokenizer_sha256": trained_with}
        described = EXPORT_FORMAT | described | {"weights_sha256": sha256(folder / EXPORTED_MODEL)}
        write_json(folder / EXPORTED_CONFIG, described | {"config_sha256": content_sha256(described, "config_sha256")})
        with atomic_write(folder / CARD) as file:
            file.write(_model_card(folder.name, config, trained_with, tokenizer is not None, text).encode())
    logger.info("%s: %d tensors, %s", folder, len(tensors), "averaged weights" if ema else "weights")


def _narrowed(tensor: torch.Tensor, bf16: bool) -> torch.Tensor:
    return tensor.bfloat16() if bf16 and tensor.is_floating_point() else tensor


def _read_notes(path: Path | None) -> str:
    return "" if path is None else f"\n{read_text('file of notes', path).strip()}\n"


def check_state(state: dict[str, torch.Tensor], config: LPDConfig, source: str) -> None:
    """Raise UserError unless names and shapes are those of the model."""
    with shapes_only():
        load_weights(LPD(config), {key: value.to("meta") for key, value in state.items()}, source)


def _recorded_config(content: dict[str, Any], source: Path) -> LPDConfig:
    config = recorded_config(content, source)
    if config is None:
        raise UserError(f"{source} records no configuration of its model, so it can't be exported.")
    return config


def _model_card(name: str, config: LPDConfig, trained_with: str | None, has_tokenizer: bool, notes: str) -> str:
    recorded = f"SHA-256 `{trained_with}`" if trained_with else "not recorded"
    return f"""---
tags: [lpd, image-generation, class-conditional]
---
# {name}

A class-conditional image generator that decodes tokens in parallel, by the method of *Locality-aware Parallel Decoding*
([arXiv 2507.01957](https://arxiv.org/abs/2507.01957)): {config.img_size} pixels, {config.class_num} classes, width
{config.embed_dim}, depth {config.depth}, {config.num_heads} heads.

Tokenizer: {config.vocab_size} codes, stride {config.stride}, {recorded}\
{", in this repository" if has_tokenizer else ""}. Generate images:

```bash
python main_lpd.py --evaluate --pretrained_ckpt NAME_OR_FOLDER {"" if has_tokenizer else "--vqgan_path TOKENIZER "}\\
    --generation_steps {default_steps(config.grid_size)} --cfg 3 --num_images 100 \\
    --feature_extractor none --save_images --output_dir samples
```
{notes}"""


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload an exported folder to the hub as ``repo``, which is created if it is not there yet; returns its URL.

    Raises:
        UserError: if the folder does not hold an exported model, whole, or the hub refuses it.
    """
    with hub_errors(f"{repo} can't be uploaded"):
        validate_repo_id(repo)
    content = load_checkpoint(folder / EXPORTED_MODEL)
    check_state(content["model"], _recorded_config(content, folder / EXPORTED_CONFIG), str(folder / EXPORTED_MODEL))
    for path in (folder / name for name in TOKENIZERS):
        if path.exists() and sha256(path) != content.get("tokenizer_sha256"):
            raise UserError(f"{path} is damaged or not the one that was exported: its SHA-256 differs; export again.")
    api = HfApi()
    with hub_errors(f"{repo} can't be uploaded; log in with hf auth login, or set HF_TOKEN to a token that may write"):
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=sorted(FILES),
            commit_message="LPD model",
        )
    return str(url)
