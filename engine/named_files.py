"""The files that the flags name: all looked for at once before anything else is done, then found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.config import Config
from engine.hub.download import COMMAND, DOWNLOADS, GUIDED_DIFFUSION, OPENAI_STATISTICS, ORDERS_DIR, ORDERS_REPO
from engine.hub.remote import Choice, find_file, hub_name, own_tokenizer
from engine.recipes import TOKENIZER
from engine.scoring.features import INCEPTION, INCEPTION_INSTEAD, INCEPTION_URL, inception_cache
from util.checkpoint import find_checkpoints
from util.data.classes import ClassChoice
from util.dist import Dist
from util.errors import UserError, refuse

TOKENIZER_MISSING = "--vqgan_path is missing; give the tokenizer (LlamaGen's vq_ds16_c2i.pt or one of your own)."


def check_files(config: Config) -> None:
    """Look for every file that the flags name, or should name, before anything else is done.

    Raises:
        UserError: naming all flags that are missing, and all files: where each comes from, where it belongs and how to
            get it.
    """
    unnamed = list(_unnamed_files(config))
    missing = [f"{path}: {what}" for path, what in _named_files(config) if path is not None and not Path(path).exists()]
    # Inception is downloaded when it is needed; it is named where something has to be fetched anyway.
    if missing and config.evaluate and config.evaluation.scoring.needs_download:
        missing.append(
            f"{inception_cache()}: the Inception weights of {INCEPTION_URL}; get them with: {COMMAND} inception; "
            f"{INCEPTION_INSTEAD}"
        )
    if unnamed or len(missing) == 1:
        refuse([*unnamed, *(f"missing file {file}" for file in missing)], " on the command line")
    if missing:
        raise UserError("\n  ".join([f"{len(missing)} files are missing:", *missing]))


def tokenizer_named(config: Config) -> Path | None:
    """The tokenizer that a run uses, a file or where it is looked for; None where it needs none or none is named."""
    return config.vqgan_path or (own_tokenizer(config.pretrained_ckpt) if needs_tokenizer(config) else None)


def needs_tokenizer(config: Config) -> bool:
    """Whether a run encodes or decodes images."""
    if config.training is None:
        return True
    encodes = not config.data.use_cached or config.data.val_path is not None
    return encodes or config.training.online_eval or config.training.sample_freq > 0


def _unnamed_files(config: Config) -> Iterator[str]:
    """A sentence for each flag that this run lacks, or has beside another one that excludes it."""
    data = config.data
    if config.training is None:
        if config.pretrained_ckpt is None:
            yield "--evaluate needs --pretrained_ckpt, the checkpoint to evaluate."
    else:
        if data.use_cached and data.cached_path is None:
            yield "--use_cached needs --cached_path, a code cache made by main_cache.py."
        elif not data.use_cached and data.data_path is None:
            yield "give training data: --data_path IMAGES, or --use_cached --cached_path CODES."
        if data.use_cached and data.val_path is None and data.choice != ClassChoice():
            yield "--classes and --class_names choose among images; give them to main_cache.py, which makes the codes."
        if data.val_path is not None and data.val_cached_path is not None:
            yield "--val_path and --val_cached_path are the same images in two forms; give one of them."
        if config.model.new_classes and config.pretrained_ckpt is None:
            yield "--new_classes needs --pretrained_ckpt, the checkpoint whose other weights are kept."
    if needs_tokenizer(config) and tokenizer_named(config) is None:
        yield TOKENIZER_MISSING


def _named_files(config: Config) -> Iterator[tuple[Path | str | None, str]]:
    """(path, what it should be and where it comes from) of every local file or folder that this run will read."""
    training, scoring = config.training, config.evaluation.scoring
    if training is not None and config.data.use_cached:
        yield config.data.cached_path, f"codes of the training images; make them with: {cache_command(config)}"
    if training is not None:
        yield config.data.val_cached_path, "codes of images that are not trained on; make them with main_cache.py"
        yield training.group_sizes_list, "schedules to train on, a JSON list of lists of group sizes"
    path = config.pretrained_ckpt
    if path is not None and hub_name(path) is None and not (training and find_run(config.output_dir, training.resume)):
        yield path, _origin(path, "a checkpoint: a file, an exported folder, or a name on the Hugging Face hub")
    path = config.vqgan_path
    if path is not None and hub_name(path) is None:
        yield path, _origin(path, "a tokenizer: LlamaGen's vq_ds16_c2i.pt, or one of python -m tokenizers.train")
    if training is not None and not training.online_eval:
        return
    yield (
        config.evaluation.orders.lpd_order_file,
        f"a file of orders; draw one with python -m orders generate, or get the published ones of {ORDERS_REPO} to "
        f"{ORDERS_DIR} with: {COMMAND} orders",
    )
    yield config.evaluation.orders.schedule_file, "a schedule; find one with python -m scripts.find_schedule"
    path = scoring.reference_statistics
    if path is not None:
        yield path, f"reference statistics; {statistics_origin(path)}"
    if scoring.feature_extractor != INCEPTION:
        yield scoring.feature_extractor, f"a feature extractor, {INCEPTION} or a file of python -m engine.classifier"
    yield scoring.inception_path, f"the Inception weights of {INCEPTION_URL}; {INCEPTION_INSTEAD}"


def find_run(output_dir: Path, resume: Path | None) -> Path | None:
    """Where the run lies that is resumed: `output_dir` if it holds checkpoints, else `resume` if it does or is one."""
    if find_checkpoints(output_dir):
        return output_dir
    return resume if resume is not None and (resume.is_file() or find_checkpoints(resume)) else None


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


def cache_command(config: Config) -> str:
    """The command that makes the code cache that the flags ask for."""
    tokenizer = config.vqgan_path or TOKENIZER
    size = "" if config.model.img_size is None else f"--img_size {config.model.img_size} "
    data = config.data.data_path or "IMAGES"
    files = f"--vqgan_path {tokenizer} --data_path {data} --cached_path {config.data.cached_path}"
    return f"python main_cache.py {size}{files}"


def local_file(path: Path, choose: Choice, dist: Dist, download: bool = True) -> Path:
    """The file that a path or a name on the hub stands for (:func:`engine.hub.remote.find_file`); rank 0 loads it."""
    found = dist.on_main(lambda: find_file(path, choose, download))
    return found if found.is_file() else find_file(path, choose, download)  # a machine with a cache of its own
