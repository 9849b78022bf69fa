"""From the configuration of a training to one that is ready to start: all inputs opened and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.class_names import class_names
from engine.config import Config
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import EvalInputs, open_inputs
from engine.hub.remote import choose_tokenizer, choose_weights
from engine.model_choice import check_tokenizer, load_pretrained
from engine.named_files import check_files, find_run, local_file, needs_tokenizer, tokenizer_named
from engine.training.batch import OrderMixture
from engine.training.config import TrainConfig
from engine.training.data import code_geometry, open_dataset, open_validation, verify
from engine.training.resume import check_continues, load_resumable
from engine.training.sample_grid import SampleGrid
from engine.training.step import choose_attention
from engine.training.trackers import Tracker
from engine.training.trainer import Trainer
from engine.training.validation import Validation
from models.lpd import LPD, LPDConfig, load_weights
from orders import published_group_sizes, read_schedules
from orders.config import parse_shares
from tokenizers import VQModel, load_tokenizer, log_quality
from util.checkpoint import load_checkpoint, load_newest
from util.config import record
from util.data.codes import CodeDataset
from util.data.images import ImageDataset
from util.data.sampler import GlobalBatchSampler
from util.dist import Dist
from util.errors import UserError, about
from util.files import check_output_dir, sha256
from util.folder_lock import FolderLock
from util.signals import exit_status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a training starts from; `content` is emptied as it is used, since it is gigabytes."""

    path: Path
    content: dict[str, Any]
    resumed: bool  # the same run is continued, rather than a new one begun with these weights

    @property
    def step(self) -> int:
        return self.content["step"] if self.resumed else 0

    def named(self) -> AbstractContextManager[None]:
        """Errors about it name it, and say how to begin without it."""
        return about(
            self.path, "This run is resumed from it; for a new one give another --output_dir." if self.resumed else ""
        )


@dataclass(frozen=True)
class PreparedTraining:
    """A training that only has to be started."""

    config: Config
    training: TrainConfig
    dist: Dist
    model_config: LPDConfig
    dataset: CodeDataset | ImageDataset
    validation: CodeDataset | ImageDataset | None
    steps_per_epoch: int
    schedules: Sequence[Sequence[int]]
    tokenizer: VQModel | None  # where images are encoded or decoded
    tokenizer_sha256: str | None
    start_from: StartingPoint | None
    eval_inputs: EvalInputs | None  # where there is an evaluation
    draw_grid: SampleGrid | None

    def start(self) -> int:
        """Train; returns the exit status."""
        torch.manual_seed(self.config.seed)
        model, start = LPD(self.model_config), self.start_from
        start_step = 0
        if start is not None:
            start_step = start.step
            new_classes = self.config.model.new_classes and not start.resumed
            load_weights(model, start.content.pop("model"), str(start.path), not start.resumed, new_classes)
            if start.resumed:
                logger.info("resuming from %s, step %d", start.path, start_step)
            else:
                start.content.clear()
        validate = None
        if self.validation is not None:
            validate = Validation(
                self.validation,
                self.schedules,
                self.dist,
                tokenizer=self.tokenizer,
                bf16=self.training.bf16,
                num_workers=self.training.num_workers,
            )
        trackers: list[Tracker] = []
        if self.dist.is_main:
            trackers = self.training.trackers.open(self.config.output_dir, start_step, record(self.config))
        try:
            stopped_by = Trainer(
                model.to(self.dist.device),
                self.dataset,
                self.schedules,
                self.training,
                self.dist,
                tokenizer=self.tokenizer,
                resume=start.content if start is not None and start.resumed else None,
                resume_from="" if start is None else f"checkpoint {start.path}",
                metadata={
                    "args": record(self.config),
                    "classes": self.dataset.classes,
                    "tokenizer_sha256": self.tokenizer_sha256,
                },
                evaluate=partial(self._evaluate, start_step, trackers) if self.eval_inputs is not None else None,
                validate=validate,
                draw_grid=self.draw_grid,
                trackers=trackers,
            ).run()
        finally:
            for tracker in trackers:
                tracker.close()
        return 0 if stopped_by is None else exit_status(stopped_by)

    def _evaluate(self, start_step: int, trackers: Sequence[Tracker], model: LPD, epoch: int) -> None:
        """Evaluate a model in training; the scores go to the trackers as well."""
        assert self.eval_inputs is not None
        assert self.tokenizer is not None
        config, step = self.config.evaluation.for_epoch(epoch), epoch * self.steps_per_epoch
        path = config.output_dir / "results.json"
        if self.dist.broadcast(step == start_step and path.exists()):  # done before the run was resumed just here
            return
        if self.dist.is_main:
            path.unlink(missing_ok=True)  # of an earlier run
        about = {"training_recipe": self.config.recipe, "epoch": epoch, "step": step, "ema": self.training.ema}
        results = evaluate(model, self.tokenizer, config, self.eval_inputs, self.dist, record=about)
        scores = {f"eval/{name}": value for name, value in results.items() if isinstance(value, float)}
        for tracker in trackers:
            tracker.scalars(scores, step)


def prepare_training(config: Config, dist: Dist, lock: FolderLock) -> PreparedTraining:
    """Open and check all that a training needs; called by all processes.

    Args:
        lock: of the output folder, taken here before it is searched for checkpoints; not for a dry run.

    Raises:
        UserError: for a file that is missing or damaged, or settings and files that do not fit each other.
    """
    training, evaluation = config.training, config.evaluation
    assert training is not None
    training.trackers.require_packages()
    check_output_dir(config.output_dir)
    check_files(config)
    tokenizer_path = tokenizer_named(config)
    download, tokenizer_file = not config.dry_run, None
    if tokenizer_path is not None:
        tokenizer_file = local_file(tokenizer_path, choose_tokenizer, dist, download)
        log_quality(tokenizer_file)
    if not config.dry_run:
        dist.on_main(lock.acquire)
    start = _resumed(config, training, dist) or _pretrained(config, dist)
    recorded = None if start is None else start.content.get("config")
    tokenizer_sha256 = None if tokenizer_file is None else sha256(tokenizer_file)
    tokenizer = None
    if needs_tokenizer(config):
        assert tokenizer_file is not None
        tokenizer = load_tokenizer(tokenizer_file, dist.device)
    dataset = open_dataset(config, tokenizer, tokenizer_sha256, recorded or {})
    codes = code_geometry(dataset, tokenizer)
    if isinstance(dataset, CodeDataset) and dataset.header is not None and tokenizer_file is None:
        tokenizer_sha256 = dataset.header.tokenizer_sha256
    validation = open_validation(config.data, dataset, codes, tokenizer, tokenizer_sha256)
    for images in (dataset, validation):
        verify(images, dist, again=config.data.verify_cache, remember=not config.dry_run)
    resumed = start is not None and start.resumed
    num_classes = len(dataset.classes)
    choice = dataclasses.replace(config.model, img_size=codes.img_size)
    with contextlib.nullcontext() if start is None else start.named():
        if start is not None:
            check_tokenizer(start.content, start.path, tokenizer_sha256)
            if not resumed:
                _check_classes(config, start, dataset.classes)
        model_config = choice.resolve(recorded, codes.stride, codes.vocab_size, num_classes, resizable=not resumed)
    if isinstance(dataset, CodeDataset):
        dataset.vocab_size = codes.vocab_size
    classes = class_names(model_config, dataset.classes)
    eval_inputs = None
    if training.online_eval:
        eval_inputs = open_inputs(evaluation, model_config, dist, classes, download=download)
    draw_grid = None
    if training.sample_freq > 0 and tokenizer is not None:
        draw_grid = SampleGrid(model_config, tokenizer, evaluation, classes, dist)
    choose_attention(training.attention, model_config, dist.device)
    if model_config.attn_dropout > 0 and dist.is_main:
        logger.warning(
            "--attn_dropout %g drops attention weights, and FlexAttention is off; the published models were trained "
            "without it, since fused attention ignored the flag", model_config.attn_dropout,
        )  # fmt: skip
    global_batch = training.global_batch(dist.world_size)
    sampler = GlobalBatchSampler(len(dataset), global_batch, dist.rank, dist.world_size, config.seed)
    if start is not None and resumed:  # before the settings in the folder become those of this start
        counted_in = {"global_batch": global_batch, "num_samples": len(dataset), "seed": config.seed}
        check_continues(start.content, f"checkpoint {start.path}", counted_in, training.epochs)
    return PreparedTraining(
        config=dataclasses.replace(config, model=choice),
        training=training,
        dist=dist,
        model_config=model_config,
        dataset=dataset,
        validation=validation,
        steps_per_epoch=sampler.steps_per_epoch,
        schedules=_schedules(training, model_config),
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer_sha256,
        start_from=start,
        eval_inputs=eval_inputs,
        draw_grid=draw_grid,
    )


def _schedules(training: TrainConfig, model: LPDConfig) -> list[tuple[int, ...]]:
    """The schedules of group sizes to draw from, which the kinds of training orders can follow."""
    if training.group_sizes_list is None:
        schedules = published_group_sizes(model.img_size, model.stride)
    else:
        schedules = read_schedules(training.group_sizes_list, model.num_tokens)
    OrderMixture(parse_shares(training.train_orders), model.grid_size, schedules, training.seed)
    return schedules


def _resumed(config: Config, training: TrainConfig, dist: Dist) -> StartingPoint | None:
    """The newest checkpoint of the output folder, else that of --resume, else None: the run begins."""
    found: tuple[Path, dict[str, Any]] | None = None

    def find() -> Path | None:
        nonlocal found
        run = find_run(config.output_dir, training.resume)
        if run is None:
            _check_resume(training.resume)
            return None
        found = (run, load_resumable(run)) if run.is_file() else load_newest(run, load_resumable)
        return None if found is None else found[0]

    path = dist.on_main(find)
    if path is None:
        return None
    return StartingPoint(path, load_checkpoint(path) if found is None else found[1], resumed=True)


def _check_resume(path: Path | None) -> None:
    """Refuse a file that is not there; a folder without checkpoints is where a run is still to begin."""
    if path is None:
        return
    if path.suffix in (".pth", ".safetensors") and not path.is_dir():
        raise UserError(f"--resume {path} does not exist; give a checkpoint, or a folder for checkpoints.")
    logger.info("--resume %s holds no checkpoints: the training starts from the beginning", path)


def _pretrained(config: Config, dist: Dist) -> StartingPoint | None:
    if config.pretrained_ckpt is None:
        return None
    path = local_file(config.pretrained_ckpt, choose_weights, dist, download=not config.dry_run)
    return StartingPoint(path, load_pretrained(path, config.use_ema), resumed=False)


def _check_classes(config: Config, start: StartingPoint, classes: list[str]) -> None:
    """Refuse to start from a table of other classes than those of the data, unless the user has said what to do."""
    table = start.content["model"].get("class_emb.weight")
    if config.model.new_classes or table is None:
        return
    wanted = len(classes) if config.model.class_num is None else config.model.class_num
    if len(table) != wanted:
        keep = f", or --class_num {len(table)} to keep the old one" if len(table) > wanted else ""
        raise UserError(
            f"{start.path} has {len(table)} classes, this run {wanted}; give --new_classes to start with a new class "
            f"table{keep}."
        )
    trained_on = start.content.get("classes")
    if trained_on is not None and list(trained_on) != classes:
        logger.warning("%s was trained on classes of other names; its class table is kept", start.path)
