"""The flags of `main_lpd.py`: the settings of :class:`engine.config.Config`, with a recipe as their defaults."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.hub.download import ORDERS_DIR
from engine.published_flags import add_unused_process_flags, add_unused_tokenizer_flags
from engine.recipes import EVAL_RECIPES, RELEASED, TRAIN_RECIPES, checkpoint_path
from engine.run_config import RunConfig
from models.sampling import Sampling
from orders.config import OrderConfig
from util.cli import Parser, from_args
from util.config import names, record
from util.errors import UserError

# The published trainings drop out; a model has none of its own accord.
PUBLISHED_DEFAULTS = {"proj_dropout": 0.1}
# Settings on which an evaluation's figures depend, beside files and seed.
FIGURES_DEPEND_ON = (
    *("model", "img_size", "use_ema", "num_images", "bf16", "decode_path", "feature_extractor"),
    *(name for name in names(OrderConfig, Sampling) if name != "lpd_order_file"),
)


def build_parser() -> Parser:
    parser = Parser(
        prog="main_lpd.py",
        description="Train LPD (locality-aware parallel decoding), or evaluate a checkpoint with --evaluate.",
    )
    parser.add_config(RunConfig)
    parser.add_config(Config, PUBLISHED_DEFAULTS)
    parser.add_unused("--log_dir", instead="--output_dir gets metrics.jsonl, and --tensorboard event files beside it")
    parser.add_unused("--resume_epoch", instead="a run resumes from the newest checkpoint, or from --resume FILE")
    add_unused_tokenizer_flags(parser)
    add_unused_process_flags(parser)
    return parser


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration that a command line asks for; a recipe's values are defaults, what is given beside it wins.

    Raises:
        UserError: for flags that do not exist, or settings out of range.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    recipe = _chosen_recipe(words)
    parser.set_defaults(**recipe)
    args = parser.parse_args(words)
    given = {word.partition("=")[0] for word in words}
    if args.schedule_file is not None and "--repulsion_threshold" not in given:
        args.repulsion_threshold = None  # the file's takes the place of a recipe's
    if args.evaluate and recipe and args.lpd_order_file is None and "--order" not in given:
        args.lpd_order_file = _published_orders(args, parser)
    args.pretrained_ckpt = _released_file(args.pretrained_ckpt)
    return from_args(Config, args, **({"training": None} if args.evaluate else {}))


def _chosen_recipe(words: list[str]) -> dict[str, Any]:
    """The flags of --recipe, if there is one."""
    parser = Parser(add_help=False)
    parser.add_config(Config, skip=set(names(Config)) - {"evaluate", "recipe"})
    chosen, _ = parser.parse_known_args(words)
    if chosen.recipe is None:
        return {}
    recipes, kind = (EVAL_RECIPES, "evaluation") if chosen.evaluate else (TRAIN_RECIPES, "training")
    if chosen.recipe not in recipes:
        raise UserError(f"there is no {kind} recipe {chosen.recipe!r}; choose one of {', '.join(recipes)}.")
    return recipes[chosen.recipe]


def _published_orders(args: argparse.Namespace, parser: Parser) -> Path | None:
    """The file of the orders that a recipe's figures were published with, if it is there and the flags are its own."""
    decisive = ("img_size", *(name for name in names(OrderConfig) if name not in ("order", "lpd_order_file")))
    own = all(getattr(args, name) == parser.get_default(name) for name in decisive)
    if not own or args.num_images > parser.get_default("num_images"):
        return None
    path = ORDERS_DIR / f"res{args.img_size}_steps{args.generation_steps}_repulsion{args.repulsion_threshold}.json"
    return path if path.is_file() else None


def _released_file(path: Path | None) -> Path | None:
    """Released weights go by one name, whichever of the two forms has been downloaded."""
    if path is None or path.is_file() or path not in {Path(checkpoint_path(*released)) for released in RELEASED}:
        return path
    other = path.with_suffix(".safetensors")
    return other if other.is_file() else path


def recipe_changes(config: Config) -> dict[str, Any]:
    """Settings of an evaluation that differ from its recipe's and matter to the figures."""
    own, mine = record(parse(["--evaluate", "--recipe", str(config.recipe)])), record(config)
    return {name: mine[name] for name in FIGURES_DEPEND_ON if mine[name] != own[name]}
