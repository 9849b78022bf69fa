"""The files that the flags name: all looked for at once, before anything else is done."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from engine.hub.published import COMMAND, DOWNLOADS, GUIDED_DIFFUSION, OPENAI_STATISTICS, ORDERS_DIR, ORDERS_REPO
from engine.hub.remote import hub_name
from engine.recipes import TOKENIZER
from engine.scoring.features import INCEPTION, INCEPTION_URL, inception_cache
from util.checkpoint import find_checkpoints
from util.errors import UserError


def check_files(args: argparse.Namespace) -> None:
    """Look for every file that the flags name, before anything else is done.

    Raises:
        UserError: naming all that are missing, where each comes from, where it belongs and how to get it.
    """
    missing = list(_missing(args))
    # Inception is downloaded when it is needed; it is named where something has to be fetched anyway.
    if missing and args.evaluate and _needs_inception(args) and not inception_cache().is_file():
        missing.append(
            f"{inception_cache()}: the Inception weights of {INCEPTION_URL}; get them with: {COMMAND} inception"
        )
    if len(missing) == 1:
        raise UserError(f"missing file {missing[0]}")
    if missing:
        raise UserError("\n  ".join([f"{len(missing)} files are missing:", *missing]))


def _needs_inception(args: argparse.Namespace) -> bool:
    return args.feature_extractor == INCEPTION and args.inception_path is None


def _missing(args: argparse.Namespace) -> Iterator[str]:
    scores = args.evaluate or args.online_eval
    resumes = not args.evaluate and (args.resume is not None or bool(find_checkpoints(args.output_dir)))
    if not args.evaluate and args.use_cached and args.cached_path is not None and not args.cached_path.is_dir():
        yield f"{args.cached_path}: codes of the training images; make them with: {cache_command(args)}"
    path = args.pretrained_ckpt
    if path is not None and not resumes and not path.exists() and hub_name(path) is None:
        expected = "a checkpoint: a file, an exported folder, or a name on the Hugging Face hub"
        yield f"{path}: {_origin(path, expected)}"
    path = args.vqgan_path
    if path is not None and not path.exists() and hub_name(path) is None:
        expected = "a tokenizer: LlamaGen's vq_ds16_c2i.pt, or one of python -m tokenizers.train"
        yield f"{path}: {_origin(path, expected)}"
    path = args.lpd_order_file
    if scores and path is not None and not path.is_file():
        yield (
            f"{path}: a file of orders; draw one with python -m orders generate, or get the published ones of "
            f"{ORDERS_REPO} to {ORDERS_DIR} with: {COMMAND} orders"
        )
    path = args.reference_statistics
    if scores and path is not None and not path.is_file():
        yield f"{path}: reference statistics; {statistics_origin(path)}"
    if scores and args.feature_extractor not in (INCEPTION, "none") and not Path(args.feature_extractor).is_file():
        yield f"{args.feature_extractor}: a feature extractor, {INCEPTION} or a file of python -m engine.classifier"
    path = args.inception_path
    if scores and path is not None and not path.is_file():
        yield f"{path}: the Inception weights of {INCEPTION_URL}"


def _origin(path: Path, expected: str) -> str:
    download = DOWNLOADS.get(path.stem)
    if download is None:
        return f"{expected}."
    where = "" if path == download.place else f" to {download.place}"
    return f"{download.what} of https://huggingface.co/{download.repo}; get it{where} with: {COMMAND} {path.stem}"


def statistics_origin(path: Path) -> str:
    """Where statistics for --reference_statistics come from."""
    size = 512 if "512" in path.name else 256
    ours = f"python -m engine.metrics --data_path IMAGES --img_size {size} --output {path}"
    if "imagenet" not in path.name and "adm_in" not in path.name:
        return f"compute them from real images with: {ours}"
    return (
        f"ADM's of ImageNet. OpenAI's {OPENAI_STATISTICS[size]} ({GUIDED_DIFFUSION}) holds the same: put it there as "
        f"{path.name}, or give it as --reference_statistics; or compute them with: {ours}"
    )


def cache_command(args: argparse.Namespace) -> str:
    """The command that makes the cache of codes that the flags ask for."""
    tokenizer = args.vqgan_path or TOKENIZER
    size = 256 if args.img_size is None else args.img_size
    data = args.data_path or "IMAGES"
    files = f"--vqgan_path {tokenizer} --data_path {data} --cached_path {args.cached_path}"
    return f"python main_cache.py --img_size {size} {files}"
