"""Train LPD, or evaluate a checkpoint with --evaluate. Run plainly or under torchrun; see --help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.evaluate import evaluate
from engine.options import eval_config, parse, resolve_model, settings, train_config
from engine.recipes import EXPECTED
from engine.train import train
from models.lpd import LPD, LPDConfig, load_weights
from orders import published_group_sizes
from tokenizers import VQModel, load_tokenizer
from util.checkpoint import load_checkpoint, load_newest
from util.data import CodeDataset, ImageFolder, open_codes
from util.dist import Dist, distributed
from util.errors import UserError, exit_on_user_error
from util.files import sha256, write_json
from util.logger import setup_logging

logger = logging.getLogger("lpd")

# What the published cache layout, which has no header, was made with.
PUBLISHED_STRIDE, PUBLISHED_VOCAB = 16, 16384


def announce(args: argparse.Namespace, model: LPD, dist: Dist, file_name: str) -> None:
    """Print the resolved settings and save them in the run's folder, before any work starts."""
    resolved = {"settings": settings(args), "model": vars(model.config), "world_size": dist.world_size}
    if dist.is_main:
        print(json.dumps(resolved, indent=2), flush=True)
        logger.info("%.1fM parameters on %s", sum(p.numel() for p in model.parameters()) / 1e6, dist.device)
        if not args.dry_run:
            write_json(args.output_dir / file_name, resolved)


def open_tokenizer(args: argparse.Namespace, dist: Dist) -> VQModel:
    if args.vqgan_path is None:
        raise UserError("--vqgan_path is missing; give the tokenizer (LlamaGen's vq_ds16_c2i.pt or one of your own).")
    return load_tokenizer(args.vqgan_path, dist.device)


def build(config: LPDConfig, checkpoint: dict[str, Any] | None, source: Path | None, dist: Dist) -> LPD:
    """The network on its device, with the checkpoint's weights if there is one."""
    model = LPD(config)
    if checkpoint is not None:
        load_weights(model, checkpoint["model"], str(source))
    return model.to(dist.device)


def open_dataset(args: argparse.Namespace) -> CodeDataset | ImageFolder:
    if not args.use_cached:
        if args.data_path is None:
            raise UserError("give training data: --data_path IMAGES, or --use_cached --cached_path CODES.")
        return ImageFolder(args.data_path, args.img_size or 256, skip_broken=args.skip_broken)
    if args.cached_path is None:
        raise UserError("--use_cached needs --cached_path, a cache of codes made by main_cache.py.")
    tokenizer_hash = None if args.vqgan_path is None else sha256(args.vqgan_path)
    dataset = open_codes(args.cached_path, img_size=args.img_size, tokenizer_hash=tokenizer_hash)
    if args.img_size is None:
        header = dataset.header
        args.img_size = header.img_size if header is not None else PUBLISHED_STRIDE * dataset.grid_size
    return dataset


def find_resume(args: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
    """What the run goes on from: --resume, else the newest checkpoint of the output folder, else nothing."""
    path = args.resume or args.output_dir
    if args.resume is not None and not path.exists():
        raise UserError(f"--resume {path} is neither a checkpoint nor a folder of checkpoints.")
    found = (path, load_checkpoint(path)) if path.is_file() else load_newest(path)
    if found is None and args.resume is not None:
        raise UserError(f"--resume {path} holds no checkpoint-*.pth.")
    if found is not None and not {"optimizer", "step", "config"} <= found[1].keys():
        raise UserError(f"checkpoint {found[0]} holds weights only; give it as --pretrained_ckpt, not to resume.")
    return found


def wandb_log(args: argparse.Namespace) -> Callable[[dict[str, float]], None]:
    try:
        import wandb
    except ImportError:
        raise UserError("--use_wandb needs the package wandb; install it with: pip install wandb.") from None
    run = wandb.init(project=args.wandb_project, name=args.wandb_run_name, config=settings(args), resume="allow")
    return run.log


def run_training(args: argparse.Namespace, dist: Dist) -> int:
    config = train_config(args)
    resume = find_resume(args)
    pretrained = None if args.pretrained_ckpt is None else load_checkpoint(args.pretrained_ckpt)
    dataset = open_dataset(args)
    tokenizer = open_tokenizer(args, dist) if args.online_eval or not args.use_cached else None
    header = dataset.header if isinstance(dataset, CodeDataset) else None
    if tokenizer is not None:
        stride, vocab_size = tokenizer.stride, tokenizer.config.codebook_size
    elif header is not None:
        stride, vocab_size = header.img_size // header.grid_size, header.vocab_size
    else:
        stride, vocab_size = PUBLISHED_STRIDE, PUBLISHED_VOCAB
    recorded = (resume[1] if resume else pretrained or {}).get("config")
    model_config = resolve_model(args, recorded, stride, vocab_size, len(dataset.classes), resizable=resume is None)
    if isinstance(dataset, CodeDataset):
        if dataset.num_tokens != model_config.num_tokens:
            raise UserError(
                f"cache {args.cached_path} holds {dataset.num_tokens} codes per image, the model has "
                f"{model_config.num_tokens} (image size {model_config.img_size}, stride {model_config.stride})."
            )
        dataset.vocab_size = vocab_size
    torch.manual_seed(args.seed)
    source, checkpoint = resume or (args.pretrained_ckpt, pretrained)
    model = build(model_config, checkpoint, source, dist)
    evaluation = eval_config(args, model_config, dataset.classes) if args.online_eval else None
    announce(args, model, dist, "train_settings.json")
    if args.dry_run:
        return 0
    if resume:
        logger.info("going on from %s, step %d", source, resume[1]["step"])

    def evaluate_now(model: LPD, epoch: int) -> None:
        assert evaluation is not None
        assert tokenizer is not None
        evaluate(model, tokenizer, evaluation.for_epoch(epoch), dist)

    metadata: dict[str, Any] = {"args": settings(args), "classes": dataset.classes}
    tokenizer_hash = header.tokenizer_sha256 if header else None
    metadata["tokenizer_sha256"] = sha256(args.vqgan_path) if tokenizer is not None else tokenizer_hash
    stopped_by = train(
        model,
        dataset,
        published_group_sizes(model_config.img_size, model_config.stride),
        config,
        dist,
        tokenizer=tokenizer,
        resume=resume[1] if resume else None,
        metadata=metadata,
        evaluate=evaluate_now if args.online_eval else None,
        log=wandb_log(args) if args.use_wandb and dist.is_main else None,
    )
    return 0 if stopped_by is None else 128 + stopped_by


def run_evaluation(args: argparse.Namespace, dist: Dist) -> int:
    if args.pretrained_ckpt is None:
        raise UserError("--evaluate needs --pretrained_ckpt, the checkpoint to evaluate.")
    checkpoint = load_checkpoint(args.pretrained_ckpt)
    tokenizer = open_tokenizer(args, dist)
    trained_with = checkpoint.get("tokenizer_sha256")
    if trained_with is not None and trained_with != sha256(args.vqgan_path):
        raise UserError(
            f"{args.pretrained_ckpt} was trained on codes of another tokenizer (SHA-256 {trained_with[:12]}…) than "
            f"{args.vqgan_path}."
        )
    config = resolve_model(args, checkpoint.get("config"), tokenizer.stride, tokenizer.config.codebook_size)
    evaluation = eval_config(args, config, checkpoint.get("classes"))
    model = build(config, checkpoint, args.pretrained_ckpt, dist).eval()
    announce(args, model, dist, "eval_settings.json")
    if args.dry_run:
        return 0
    record: dict[str, Any] = {"recipe": args.recipe, "expected": None}
    if args.recipe is not None:
        record["expected"] = dataclasses.asdict(EXPECTED[args.recipe])
    for name in ("pretrained_ckpt", "vqgan_path"):
        record[name] = {"path": str(getattr(args, name)), "sha256": sha256(getattr(args, name))}
    results = evaluate(model, tokenizer, evaluation, dist, record=record)
    if dist.is_main:
        print(json.dumps({key: value for key, value in results.items() if isinstance(value, int | float)}, indent=2))
    return 0


def main() -> None:
    args = parse()
    with distributed(args.device) as dist:
        setup_logging(dist.rank)
        status = run_evaluation(args, dist) if args.evaluate else run_training(args, dist)
    sys.exit(status)


if __name__ == "__main__":
    exit_on_user_error(main)
