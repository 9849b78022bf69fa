"""Train LPD, or evaluate a checkpoint with --evaluate. Run plainly or under torchrun; see --help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from engine.evaluation.evaluate import evaluate, prepare
from engine.hub.remote import Choice, choose_tokenizer, choose_weights, find_file
from engine.inputs import check_files
from engine.options import eval_config, parse, recipe_changes, resolve_model, settings, train_config
from engine.recipes import EXPECTED, TOKENIZER
from engine.training.sample_grid import SampleGrid
from engine.training.step import choose_attention
from engine.training.stop import exit_when_told
from engine.training.trackers import TensorBoard, Tracker, WeightsAndBiases, check_trackers
from engine.training.trainer import train
from models.lpd import LPD, LPDConfig, load_weights
from orders import published_group_sizes
from tokenizers import VQModel, load_tokenizer
from util.checkpoint import load_checkpoint, load_newest
from util.cli import exit_on_user_error
from util.data.codes import CodeDataset, open_codes
from util.data.images import ImageDataset, open_images
from util.data.sampler import GlobalBatchSampler
from util.dist import Dist, distributed
from util.errors import UserError
from util.files import check_output_dir, sha256, write_json
from util.folder_lock import FolderLock
from util.logger import setup_logging
from util.signals import exit_status

logger = logging.getLogger("lpd")

# What the published cache layout, which has no header, was made with.
PUBLISHED_STRIDE, PUBLISHED_VOCAB = 16, 16384
TOKENIZER_MISSING = "--vqgan_path is missing; give the tokenizer (LlamaGen's vq_ds16_c2i.pt or one of your own)."


def announce(args: argparse.Namespace, config: LPDConfig, dist: Dist, file_name: str) -> None:
    """Print the resolved settings and save them in the run's folder, before any work starts."""
    resolved = {"settings": settings(args), "model": vars(config), "world_size": dist.world_size}
    if args.evaluate and args.recipe is not None:
        resolved["published"] = dataclasses.asdict(EXPECTED[args.recipe])
    if dist.is_main:
        print(json.dumps(resolved, indent=2), flush=True)
        if not args.dry_run:
            write_json(args.output_dir / file_name, resolved)


def local_file(path: Path, choose: Choice, dist: Dist) -> Path:
    """The file that a path or a name on the hub stands for (:func:`engine.hub.remote.find_file`); rank 0 loads it."""
    found = dist.on_main(lambda: find_file(path, choose))
    return found if found.is_file() else find_file(path, choose)  # a machine with a cache of its own


def open_tokenizer(args: argparse.Namespace, dist: Dist) -> VQModel:
    if args.vqgan_path is None:
        raise UserError(TOKENIZER_MISSING)
    return load_tokenizer(args.vqgan_path, dist.device)


def open_dataset(args: argparse.Namespace, recorded: dict[str, Any]) -> CodeDataset | ImageDataset:
    """The training data, at --img_size or else the size the checkpoint records."""
    img_size = args.img_size if args.img_size is not None else recorded.get("img_size")
    if not args.use_cached:
        if args.data_path is None:
            raise UserError("give training data: --data_path IMAGES, or --use_cached --cached_path CODES.")
        return open_images(args.data_path, 256 if img_size is None else img_size, args.skip_broken)
    if args.cached_path is None:
        raise UserError("--use_cached needs --cached_path, a cache of codes made by main_cache.py.")
    # The published runs (--recipe) need no tokenizer but name one: codes of another are refused as far as can be told.
    published = args.recipe is not None and args.vqgan_path is None
    tokenizer = Path(TOKENIZER) if published and Path(TOKENIZER).is_file() else args.vqgan_path
    tokenizer_hash = None if tokenizer is None else sha256(tokenizer)
    dataset = open_codes(args.cached_path, img_size=img_size, tokenizer_hash=tokenizer_hash)
    if published and dataset.header is not None:
        _, stride, vocab_size = code_geometry(dataset, None)
        if (stride, vocab_size) != (PUBLISHED_STRIDE, PUBLISHED_VOCAB):
            raise UserError(
                f"cache {args.cached_path} was made with another tokenizer (stride {stride}, {vocab_size} codes) than "
                f"that of --recipe {args.recipe} (stride {PUBLISHED_STRIDE}, {PUBLISHED_VOCAB} codes); give a cache of "
                "the published one, or your tokenizer as --vqgan_path."
            )
    return dataset


def code_geometry(dataset: CodeDataset | ImageDataset, tokenizer: VQModel | None) -> tuple[int, int, int]:
    """(image size, stride, number of codes) of the training data."""
    if isinstance(dataset, ImageDataset):
        assert tokenizer is not None
        return dataset.img_size, tokenizer.stride, tokenizer.config.codebook_size
    if dataset.header is not None:
        header = dataset.header
        return header.img_size, header.img_size // header.grid_size, header.vocab_size
    return PUBLISHED_STRIDE * dataset.grid_size, PUBLISHED_STRIDE, PUBLISHED_VOCAB


def find_resume(args: argparse.Namespace, dist: Dist) -> tuple[Path, dict[str, Any]] | None:
    """What the run goes on from: the newest checkpoint of the output folder, else --resume, else nothing."""
    found = None

    def find() -> Path | None:
        nonlocal found
        found = load_newest(args.output_dir)
        if found is None and args.resume is not None:
            path = args.resume
            found = (path, load_checkpoint(path)) if path.is_file() else load_newest(path)
            if found is None:
                raise UserError(f"--resume {path} is neither a checkpoint nor a folder of checkpoints.")
        return None if found is None else found[0]

    path = dist.on_main(find)
    if path is None:
        return None
    checkpoint = found[1] if found is not None else load_checkpoint(path)
    if not {"optimizer", "step", "config", "global_batch"} <= checkpoint.keys():
        raise UserError(f"checkpoint {path} can't be resumed, only used as --pretrained_ckpt: it holds weights only.")
    return path, checkpoint


def load_pretrained(args: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint of --pretrained_ckpt; with --use_ema, the moving average takes the place of its weights."""
    checkpoint = load_checkpoint(args.pretrained_ckpt)
    if args.use_ema:
        if "model_ema" not in checkpoint:
            raise UserError(f"{args.pretrained_ckpt} holds no moving average of the weights; leave out --use_ema.")
        checkpoint["model"] = checkpoint.pop("model_ema")
    return checkpoint


def check_tokenizer(checkpoint: dict[str, Any], source: Path, tokenizer_hash: str | None) -> None:
    """Refuse codes of another tokenizer than those the checkpoint was trained on, where both are known."""
    trained_with = checkpoint.get("tokenizer_sha256")
    if trained_with is not None and tokenizer_hash is not None and trained_with != tokenizer_hash:
        raise UserError(
            f"{source} was trained on codes of another tokenizer (SHA-256 {trained_with[:12]}…) than the one given "
            f"({tokenizer_hash[:12]}…)."
        )


def check_classes(args: argparse.Namespace, checkpoint: dict[str, Any], source: Path, classes: list[str]) -> None:
    """Refuse to go on from a table of other classes than those of the data, unless the user has said what to do."""
    table = checkpoint["model"].get("class_emb.weight")
    if args.new_classes or table is None:
        return
    wanted = len(classes) if args.class_num is None else args.class_num
    if len(table) != wanted:
        keep = f", or --class_num {len(table)} to keep the old one" if len(table) > wanted else ""
        raise UserError(
            f"{source} has {len(table)} classes, this run {wanted}; give --new_classes to start with a new class table"
            f"{keep}."
        )
    trained_on = checkpoint.get("classes")
    if trained_on is not None and list(trained_on) != classes:
        logger.warning("%s was trained on classes of other names; its class table is kept", source)


def open_trackers(args: argparse.Namespace, dist: Dist, start_step: int) -> list[Tracker]:
    """TensorBoard and Weights & Biases, where asked for, on rank 0."""
    trackers: list[Tracker] = []
    if args.tensorboard and dist.is_main:
        trackers.append(TensorBoard(args.output_dir, start_step))
    if args.use_wandb and dist.is_main:
        name = args.wandb_run_name or args.output_dir.name
        trackers.append(WeightsAndBiases(args.output_dir, start_step, args.wandb_project, name, settings(args)))
    return trackers


def run_training(args: argparse.Namespace, dist: Dist, lock: FolderLock) -> int:
    config = train_config(args)
    check_trackers(args.tensorboard, args.use_wandb)
    check_output_dir(args.output_dir)
    if args.new_classes and args.pretrained_ckpt is None:
        raise UserError("--new_classes needs --pretrained_ckpt, the checkpoint whose other weights are kept.")
    check_files(args)
    if args.vqgan_path is not None:
        args.vqgan_path = local_file(args.vqgan_path, choose_tokenizer, dist)
    if not args.dry_run:
        dist.on_main(lock.acquire)
    resume = find_resume(args, dist)
    if resume is None and args.pretrained_ckpt is not None:
        args.pretrained_ckpt = local_file(args.pretrained_ckpt, choose_weights, dist)
    source, checkpoint = resume or (args.pretrained_ckpt, None)
    if resume is None and args.pretrained_ckpt is not None:
        checkpoint = load_pretrained(args)
    recorded = (checkpoint or {}).get("config")
    dataset = open_dataset(args, recorded or {})
    cached = isinstance(dataset, CodeDataset)
    global_batch = config.global_batch(dist.world_size)
    sampler = GlobalBatchSampler(len(dataset), global_batch, dist.rank, dist.world_size, config.seed)
    drawing = config.sample_freq > 0
    tokenizer = open_tokenizer(args, dist) if args.online_eval or drawing or not cached else None
    img_size, stride, vocab_size = code_geometry(dataset, tokenizer)
    header = dataset.header if isinstance(dataset, CodeDataset) else None
    tokenizer_hash = header.tokenizer_sha256 if header else None
    if args.vqgan_path is not None:
        tokenizer_hash = sha256(args.vqgan_path)
    if checkpoint is not None:
        check_tokenizer(checkpoint, source, tokenizer_hash)
        if resume is None:
            check_classes(args, checkpoint, source, dataset.classes)
    args.img_size = img_size
    model_config = resolve_model(args, recorded, stride, vocab_size, len(dataset.classes), resizable=resume is None)
    if isinstance(dataset, CodeDataset):
        dataset.vocab_size = vocab_size
    evaluation = eval_config(args, model_config, dataset.classes) if args.online_eval else None
    inputs = None if evaluation is None else prepare(evaluation, model_config, dist)
    draw_grid = None
    if drawing and tokenizer is not None:
        sampling = evaluation or eval_config(args, model_config, dataset.classes)
        draw_grid = SampleGrid(model_config, tokenizer, sampling, dist)
    choose_attention(config.attention, model_config, dist.device)
    announce(args, model_config, dist, "train_settings.json")
    if args.dry_run:
        return 0
    dist.on_main(lock.acquire)  # the folder is there now
    torch.manual_seed(args.seed)
    model = LPD(model_config)
    if checkpoint is not None:
        state, anew = checkpoint.pop("model"), resume is None
        load_weights(model, state, str(source), resize=anew, new_classes=anew and args.new_classes)
        del state
    start_step = 0
    if resume is not None:
        start_step = resume[1]["step"]
        logger.info("going on from %s, step %d", source, start_step)
    del checkpoint  # gigabytes; what is left of it to resume from is dropped by train()

    def evaluate_now(model: LPD, epoch: int) -> None:
        assert evaluation is not None
        assert tokenizer is not None
        config, step = evaluation.for_epoch(epoch), epoch * sampler.steps_per_epoch
        path = config.output_dir / "results.json"
        if dist.broadcast(step == start_step and path.exists()):  # done before the run was resumed just here
            return
        if dist.is_main:
            path.unlink(missing_ok=True)  # of an earlier run
        record = {"training_recipe": args.recipe, "epoch": epoch, "step": step, "ema": args.ema}
        results = evaluate(model, tokenizer, config, dist, inputs=inputs, record=record)
        scores = {f"eval/{name}": value for name, value in results.items() if isinstance(value, float)}
        for tracker in trackers:
            tracker.scalars(scores, step)

    trackers = open_trackers(args, dist, start_step)
    try:
        stopped_by = train(
            model.to(dist.device),
            dataset,
            published_group_sizes(model_config.img_size, model_config.stride),
            config,
            dist,
            tokenizer=tokenizer,
            resume=resume[1] if resume else None,
            metadata={"args": settings(args), "classes": dataset.classes, "tokenizer_sha256": tokenizer_hash},
            evaluate=evaluate_now if evaluation else None,
            draw_grid=draw_grid,
            trackers=trackers,
        )
    finally:
        for tracker in trackers:
            tracker.close()
    return 0 if stopped_by is None else exit_status(stopped_by)


def run_evaluation(args: argparse.Namespace, dist: Dist) -> int:
    if args.pretrained_ckpt is None:
        raise UserError("--evaluate needs --pretrained_ckpt, the checkpoint to evaluate.")
    if args.vqgan_path is None:
        raise UserError(TOKENIZER_MISSING)
    check_output_dir(args.output_dir)
    check_files(args)
    args.vqgan_path = local_file(args.vqgan_path, choose_tokenizer, dist)
    args.pretrained_ckpt = local_file(args.pretrained_ckpt, choose_weights, dist)
    checkpoint = load_pretrained(args)
    tokenizer = open_tokenizer(args, dist)
    check_tokenizer(checkpoint, args.pretrained_ckpt, sha256(args.vqgan_path))
    config = resolve_model(args, checkpoint.get("config"), tokenizer.stride, tokenizer.config.codebook_size)
    evaluation = eval_config(args, config, checkpoint.get("classes"))
    inputs = prepare(evaluation, config, dist)
    if evaluation.lpd_order_file is not None:
        logger.info("image i uses order i of %s", evaluation.lpd_order_file)
    model = LPD(config)
    load_weights(model, checkpoint["model"], str(args.pretrained_ckpt))
    announce(args, config, dist, "eval_settings.json")
    if args.dry_run:
        return 0
    record: dict[str, Any] = {"recipe": args.recipe, "expected": None}
    if args.recipe is not None:
        record |= {"expected": dataclasses.asdict(EXPECTED[args.recipe]), "changed": recipe_changes(args)}
    if dist.is_main:
        for name in ("pretrained_ckpt", "vqgan_path"):
            record[name] = {"path": str(getattr(args, name)), "sha256": sha256(getattr(args, name))}
    model = model.to(dist.device).eval()
    results = evaluate(model, tokenizer, evaluation, dist, inputs=inputs, record=record)
    if dist.is_main:
        print(json.dumps({key: value for key, value in results.items() if isinstance(value, int | float)}, indent=2))
    return 0


def main() -> None:
    args = parse()
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads is {args.threads}; it must be at least 1.")
        torch.set_num_threads(args.threads)
    with exit_when_told(), distributed(args.device) as dist, FolderLock(args.output_dir, purpose="training") as lock:
        setup_logging(dist.rank)
        status = run_evaluation(args, dist) if args.evaluate else run_training(args, dist, lock)
    sys.exit(status)


if __name__ == "__main__":
    exit_on_user_error(main)
