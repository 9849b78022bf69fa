"""The flags of `main_lpd.py` and what they turn into: model, training and evaluation configurations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from engine.decoding.decoder import DECODE_PATHS
from engine.evaluation.evaluate import EvalConfig
from engine.hub.published import ORDERS_DIR
from engine.recipes import EVAL_RECIPES, RELEASED, TRAIN_RECIPES, checkpoint_path
from engine.scoring.features import INCEPTION
from engine.training.step import ATTENTIONS
from engine.training.trainer import TrainConfig
from models import MODEL_SIZES, model_config
from models.lpd import LPDConfig
from models.sampling import CFG_SCHEDULES
from orders import ORDER_KINDS, group_sizes, parse_group_sizes
from util.cli import HelpFormatter
from util.errors import UserError
from util.lr_sched import LR_SCHEDULES

# Flags on which an evaluation's figures depend, beside files and seed.
SCORED = (
    "model", "img_size", "use_ema", "generation_steps", "group_sizes", "order", "proximity_threshold",
    "repulsion_threshold", "cfg", "cfg_schedule", "temperature", "top_k", "top_p", "num_images", "bf16",
    "feature_extractor",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, once for all processes, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help explains the flags.")


def build_parser() -> argparse.ArgumentParser:
    """All flags; what a recipe names becomes the default of the flags it sets (see :func:`parse`)."""
    parser = _Parser(
        prog="main_lpd.py",
        description="Train LPD (locality-aware parallel decoding), or evaluate a checkpoint with --evaluate.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--evaluate", action="store_true", help="generate and score images instead of training")
    add("--use_ema", action="store_true", help="take --pretrained_ckpt's moving average of the weights (see --ema)")
    add("--recipe", help=f"a published run: {', '.join(TRAIN_RECIPES)}; with --evaluate {', '.join(EVAL_RECIPES)}")
    add("--output_dir", type=Path, default=Path("runs/lpd"), help="checkpoints, metrics, results, pictures")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=int, help="of the CPU, per process (default: torch's, one per core)")
    add("--seed", type=int, default=0, help="of weights, data order, orders, dropout; of the images in an evaluation")
    add("--bf16", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 autocast")
    add("--num_workers", type=int, default=8, help="processes that load images; packed codes need none")
    add("--dry_run", action="store_true", help="check everything, print the resolved settings and stop")

    group = parser.add_argument_group(
        "model", "size, pixels and classes come from the checkpoint where it records them"
    )
    add = group.add_argument
    add("--model", choices=MODEL_SIZES, help="size (default: lpd_l)")
    add("--img_size", type=int, help="pixels; a multiple of the tokenizer's stride (default: the cache's, else 256)")
    add("--class_num", type=int, help="number of classes (default: the data set's; 1000 without one)")
    add(
        "--vqgan_path",
        type=Path,
        help="tokenizer: LlamaGen's or one of tokenizers.train; a file, or user/model on the hub",
    )
    add(
        "--pretrained_ckpt",
        type=Path,
        help="weights to evaluate or start from: a file, an exported folder, or user/model on the hub",
    )
    add("--new_classes", action="store_true", help="fine-tune --pretrained_ckpt on other classes: a new class table")
    add("--label_drop_prob", type=float, default=0.1, help="share of samples trained without class, for guidance")
    add("--proj_dropout", type=float, default=0.1, help="after attention and in the MLP")
    add("--attn_dropout", type=float, default=0.0, help="on attention weights; the published models used none")
    add("--grad_checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--data_path",
        type=Path,
        help="folder with a subfolder per class, or photos.npz[:train] (util/image_data.py)",
    )
    add(
        "--use_cached",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train on the codes in --cached_path instead of images",
    )
    add("--cached_path", type=Path, help="cache of codes made by main_cache.py")
    add("--flip_prob", type=float, default=0.5, help="share of samples mirrored; 0 for pictures such as text")
    add("--skip_broken", action="store_true", help="train on without images that cannot be read")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=int, default=450, help="passes over the data")
    add("--batch_size", type=int, default=64, help="samples per process (and part, with --grad_accum)")
    add("--grad_accum", type=int, default=1, help="parts of a step whose gradients are added up: less memory")
    add("--lr", type=float, help="peak learning rate (default: blr · global batch / 256)")
    add("--blr", type=float, default=1e-4, help="learning rate per 256 samples of the global batch")
    add("--min_lr", type=float, default=1e-5, help="learning rate at the end of a cosine")
    add("--lr_schedule", choices=LR_SCHEDULES, default="constant+cosine", help="what follows the warm-up")
    add("--warmup_epochs", type=float, default=50, help="epochs in which the learning rate rises from 0")
    add("--lr_decay_start_epoch", type=float, default=400, help="where the cosine of constant+cosine starts")
    add("--weight_decay", type=float, default=0.02, help="on parameters of two and more dimensions")
    add("--grad_clip", type=float, default=3.0, help="largest norm of the gradient")
    add("--ema", type=float, default=0.0, help="decay of a moving average of the weights, such as 0.9999; 0: none")
    add("--attention", choices=ATTENTIONS, default="auto", help="flex needs a GPU; auto: flex where it can be used")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the training step (default: on a GPU, not on a CPU)",
    )
    add("--fsdp", action="store_true", help="shard weights and optimizer over the processes (FSDP2): less memory")
    add("--resume", type=Path, help="checkpoint, or folder of checkpoints (default: --output_dir, if it has any)")
    add("--log_freq", type=int, default=50, help="steps between lines of metrics.jsonl")
    add("--save_last_freq", type=int, default=1, help="epochs between saves of checkpoint-last.pth")
    add("--save_last_steps", type=int, default=0, help="steps between saves as well, for long epochs; 0: none")
    add("--keep_last", type=int, default=2, help="newest checkpoints to keep, should the last one get damaged")
    add("--save_intermediate_freq", type=int, default=0, help="epochs between checkpoints that are kept; 0: none")
    add("--online_eval", action="store_true", help="evaluate during training and at its end")
    add("--eval_freq", type=int, default=40, help="epochs between evaluations with --online_eval")
    add("--sample_freq", type=int, default=0, help="epochs between pictures of the same samples; 0: none")
    add("--max_steps", type=int, default=0, help="stop after this step, without evaluating; 1 tries a command out")
    add("--tensorboard", action="store_true", help="write event files for TensorBoard into the output folder")
    add("--use_wandb", action="store_true", help="log to Weights & Biases as well")
    add("--wandb_project", default="lpd", help="where --use_wandb logs to")
    add("--wandb_run_name", help="(default: the name of the output folder)")

    group = parser.add_argument_group("generation and scores")
    add = group.add_argument
    add("--generation_steps", type=int, default=20, help="decoding steps per image")
    add("--group_sizes", help="tokens per step instead: '1,3,5' or a JSON list, or a file with either")
    add("--order", choices=ORDER_KINDS, default="lpd", help="schedule of positions, drawn on the fly")
    add("--lpd_order_file", type=Path, help="file of orders; image i uses order i")
    add("--proximity_threshold", type=float, default=1.0, help="proximity that makes a position a candidate")
    add("--repulsion_threshold", type=int, help="distance positions of a step keep (default: grid side / 8)")
    add("--cfg", type=float, default=1.0, help="guidance scale; 1 is none")
    add(
        "--cfg_schedule", choices=CFG_SCHEDULES, default="linear", help="along the order: growing to --cfg, or constant"
    )
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--top_k", type=int, default=0, help="0 is off")
    add("--top_p", type=float, default=1.0, help="1 is off")
    add("--num_images", type=int, default=50_000, help="balanced over the classes")
    add("--eval_bsz", type=int, default=64, help="images per process and batch")
    add("--decode_path", choices=DECODE_PATHS, default="auto", help="see engine/decoder.py; plain switches it off")
    add("--speed_runs", type=int, default=0, help="time batches of 1 and 64 so many times; the paper: 500")
    add("--feature_extractor", default=INCEPTION, help=f"{INCEPTION}, a file of python -m engine.classifier, or none")
    add("--inception_path", type=Path, help="Inception weights (default: torch's hub cache, downloaded if missing)")
    add("--reference_statistics", type=Path, help="npz with mu and sigma; without it no Fréchet distance (FID)")
    add("--adm_suite", action="store_true", help="sFID, precision and recall too, where the reference holds its images")
    add("--save_images", action="store_true", help="keep the images as PNG files")
    add("--save_npz", action="store_true", help="write samples.npz for the ADM evaluation suite")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; a recipe's values are defaults, what the user gives beside it wins."""
    parser = build_parser()
    first = parser.parse_args(arguments)
    if first.recipe is None:
        return _released_file(first)
    recipes, kind = (EVAL_RECIPES, "evaluation") if first.evaluate else (TRAIN_RECIPES, "training")
    if first.recipe not in recipes:
        raise UserError(f"there is no {kind} recipe {first.recipe!r}; choose one of {', '.join(recipes)}.")
    recipe = recipes[first.recipe]
    parser.set_defaults(**recipe)
    if not first.evaluate:
        return _released_file(parser.parse_args(arguments))
    parser.set_defaults(order=None)  # to tell whether it is given
    args = parser.parse_args(arguments)
    args.lpd_order_file = args.lpd_order_file or _published_orders(args, recipe, parser)
    args.order = args.order or recipe["order"]
    return _released_file(args)


def _released_file(args: argparse.Namespace) -> argparse.Namespace:
    """Released weights go by one name, whichever of the two forms has been downloaded."""
    path = args.pretrained_ckpt
    if path in {Path(checkpoint_path(*released)) for released in RELEASED} and not path.is_file():
        other = path.with_suffix(".safetensors")
        args.pretrained_ckpt = other if other.is_file() else path
    return args


def _published_orders(args: argparse.Namespace, recipe: dict[str, Any], parser: argparse.ArgumentParser) -> Path | None:
    """The file of the orders that a recipe's figures were published with, if it is there and all flags are its own."""
    names = ("img_size", "generation_steps", "group_sizes", "repulsion_threshold", "proximity_threshold")
    if args.order is not None or args.num_images > recipe["num_images"]:
        return None
    if any(getattr(args, name) != parser.get_default(name) for name in names):
        return None
    name = f"res{args.img_size}_steps{args.generation_steps}_repulsion{args.repulsion_threshold}.json"
    return ORDERS_DIR / name if (ORDERS_DIR / name).is_file() else None


def recipe_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of an evaluation that differ from its recipe's and matter to the figures."""
    own = parse(["--evaluate", "--recipe", args.recipe])
    return {name: settings(args)[name] for name in SCORED if getattr(args, name) != getattr(own, name)}


def resolve_model(
    args: argparse.Namespace,
    recorded: dict[str, Any] | None,
    stride: int,
    vocab_size: int,
    class_num: int | None = None,
    resizable: bool = False,
) -> LPDConfig:
    """The model's configuration: what the checkpoint records, else flags, else defaults.

    Args:
        recorded: `config` of a checkpoint, or None where it records none.
        stride, vocab_size: the tokenizer's.
        class_num: the data set's, or None where there is no data set.
        resizable: whether --img_size may differ from the checkpoint's (positions are resized when training goes on at
            another resolution).

    Raises:
        UserError: where a flag or the tokenizer contradicts the checkpoint.
    """
    dropouts = {name: getattr(args, name) for name in ("label_drop_prob", "proj_dropout", "attn_dropout")}
    dropouts |= {"grad_checkpointing": args.grad_checkpointing}
    if recorded is None:
        given = (args.class_num, class_num, 1000)
        classes = next(count for count in given if count is not None)
        name = "lpd_l" if args.model is None else args.model
        size = 256 if args.img_size is None else args.img_size
        config = model_config(name, img_size=size, stride=stride, vocab_size=vocab_size, class_num=classes, **dropouts)
        if class_num is not None and classes < class_num:
            raise UserError(f"--class_num is {classes}, but the data set has {class_num} classes.")
        return config
    if recorded.keys() != LPDConfig.__dataclass_fields__.keys():
        raise UserError("the checkpoint is of something else than an LPD model: its 'config' does not describe one.")
    wanted: dict[str, Any] = {"stride": stride, "vocab_size": vocab_size}
    wanted |= {key: value for key in ("img_size", "class_num") if (value := getattr(args, key)) is not None}
    if args.model is not None:
        wanted |= dict(zip(("embed_dim", "depth", "num_heads"), MODEL_SIZES[args.model], strict=True))
    if resizable:
        recorded = recorded | {"img_size": wanted.pop("img_size", recorded["img_size"])}
    if resizable and args.new_classes and class_num is not None:
        recorded = recorded | {"class_num": wanted.pop("class_num", class_num)}
    for key, value in wanted.items():
        if recorded[key] != value:
            source = f"--model {args.model}" if key in ("embed_dim", "depth", "num_heads") else f"--{key}"
            source = "the tokenizer" if key in ("stride", "vocab_size") else source
            raise UserError(f"the checkpoint is of a model with {key} {recorded[key]}, but {source} says {value}.")
    if class_num is not None and recorded["class_num"] < class_num:
        raise UserError(f"the checkpoint has {recorded['class_num']} classes, but the data set has {class_num}.")
    return LPDConfig(**{**recorded, **dropouts})


def train_config(args: argparse.Namespace) -> TrainConfig:
    fields = TrainConfig.__dataclass_fields__
    values = {name: getattr(args, name) for name in fields}
    if not args.online_eval:
        values["eval_freq"] = 0
    return TrainConfig(**values)


def eval_config(args: argparse.Namespace, model: LPDConfig, classes: list[str] | None) -> EvalConfig:
    """The evaluation's settings; `classes` are the names the checkpoint or the data set records."""
    values = {name: getattr(args, name) for name in EvalConfig.__dataclass_fields__ if hasattr(args, name)}
    if args.group_sizes is not None:
        values["group_sizes"] = parse_group_sizes(args.group_sizes, model.num_tokens)
    else:
        values["group_sizes"] = group_sizes(model.img_size, args.generation_steps, model.stride)
    if args.feature_extractor == "none":
        values["feature_extractor"] = None
    if classes is None and model.class_num == 1000:
        from torchvision.models import ResNet18_Weights

        # Sorted WordNet ids, the order of ImageNet's labels.
        classes = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    if classes is not None:
        # A model may have more classes than the data it was last trained on.
        classes = [*classes, *(f"class {i}" for i in range(len(classes), model.class_num))]
    return EvalConfig(**values, classes=None if classes is None else tuple(classes))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as plain data, for checkpoints and results."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
