"""The commands as a user types them: the demo's path with a few steps, and wrong arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine.classifier
import engine.metrics
import main_cache
import main_lpd
import tokenizers.train
from engine.options import parse
from engine.recipes import EVAL_RECIPES, EXPECTED, TRAIN_RECIPES
from models import model_config
from orders import group_sizes
from util.errors import exit_on_user_error

SIZE = ("--img_size", "16")


def run(main: Callable[[], None], *arguments: object) -> int:
    """Exit status of a command called in this process."""
    before = sys.argv
    sys.argv = ["command", *map(str, arguments)]
    try:
        exit_on_user_error(main)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole path on a tiny data set: pictures → tokenizer → codes → LPD → classifier → statistics."""
    folder = tmp_path_factory.mktemp("path")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, colour in (("dark", 50), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = rng.normal(colour, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    train = ("--data_path", folder / "train")
    tokenizer = folder / "tok" / "tokenizer.pt"
    assert not run(
        tokenizers.train.main, *train, *SIZE, "--output_dir", folder / "tok", "--stride", 4, "--codebook_size", 16,
        "--base_width", 32, "--z_channels", 32, "--steps", 6, "--batch_size", 4, "--num_workers", 0,
    )  # fmt: skip
    assert not run(
        main_cache.main, *train, *SIZE, "--vqgan_path", tokenizer, "--cached_path", folder / "codes",
        "--num_workers", 0,
    )  # fmt: skip
    assert not run(main_lpd.main, *training(folder), "--epochs", 2)
    assert not run(
        engine.classifier.main, *train, *SIZE, "--test_path", folder / "test", "--output", folder / "classifier.pt",
        "--epochs", 1,
    )  # fmt: skip
    assert not run(
        engine.metrics.main, *train, *SIZE, "--feature_extractor", folder / "classifier.pt", "--output",
        folder / "reference.npz",
    )  # fmt: skip
    return folder


def training(folder: Path) -> tuple[object, ...]:
    return (
        "--model", "lpd_debug", *SIZE, "--use_cached", "--cached_path", folder / "codes",
        "--vqgan_path", folder / "tok" / "tokenizer.pt", "--output_dir", folder / "lpd", "--batch_size", 8,
        "--lr", 1e-3, "--lr_schedule", "cosine", "--warmup_epochs", 1, "--num_workers", 0,
    )  # fmt: skip


def evaluation(folder: Path, output: str) -> tuple[object, ...]:
    return (
        "--evaluate", "--pretrained_ckpt", folder / "lpd" / "checkpoint-last.pth",
        "--vqgan_path", folder / "tok" / "tokenizer.pt", "--output_dir", folder / output, "--generation_steps", 4,
        "--num_images", 20, "--eval_bsz", 8, "--cfg", 2.0, "--feature_extractor", folder / "classifier.pt",
        "--reference_statistics", folder / "reference.npz",
    )  # fmt: skip


def test_whole_path_gives_scores_and_pictures(workspace: Path) -> None:
    assert run(main_lpd.main, *evaluation(workspace, "eval"), "--save_images") == 0
    results = json.loads((workspace / "eval" / "results.json").read_text())
    assert {"frechet_distance", "class_accuracy", "sec_per_image"} <= results.keys()
    assert len(list((workspace / "eval" / "images").glob("*.png"))) == 20
    assert (workspace / "eval" / "grid.png").is_file()
    settings = json.loads((workspace / "eval" / "eval_settings.json").read_text())
    assert settings["model"]["vocab_size"] == 16


def test_training_again_continues_or_says_it_is_finished(workspace: Path) -> None:
    """The same command resumes by itself; with more epochs it goes on from where it was."""
    before = json.loads((workspace / "lpd" / "checkpoint-last.json").read_text())["step"]
    assert run(main_lpd.main, *training(workspace), "--epochs", 2) == 0
    assert json.loads((workspace / "lpd" / "checkpoint-last.json").read_text())["step"] == before
    more = list(training(workspace))
    more[more.index("--output_dir") + 1] = workspace / "more"
    assert run(main_lpd.main, *more, "--epochs", 3, "--resume", workspace / "lpd") == 0
    checkpoint = json.loads((workspace / "more" / "checkpoint-last.json").read_text())
    assert checkpoint["step"] == before // 2 * 3
    assert checkpoint["classes"] == ["dark", "light"]
    assert len(checkpoint["tokenizer_sha256"]) == 64


def test_training_from_images_with_online_evaluation(workspace: Path) -> None:
    assert not run(
        main_lpd.main, "--model", "lpd_debug", *SIZE, "--data_path", workspace / "train", "--vqgan_path",
        workspace / "tok" / "tokenizer.pt", "--output_dir", workspace / "images", "--batch_size", 8, "--epochs", 1,
        "--warmup_epochs", 0, "--lr_schedule", "constant", "--num_workers", 0, "--online_eval", "--num_images", 10,
        "--eval_bsz", 10, "--generation_steps", 4, "--feature_extractor", "none",
    )  # fmt: skip
    assert (workspace / "images" / "eval_epoch0001" / "grid.png").is_file()


def test_fine_tuning_from_weights_at_another_resolution(workspace: Path) -> None:
    """--pretrained_ckpt starts a new run from a checkpoint and resizes its positions."""
    assert not run(
        main_lpd.main, "--img_size", 32, "--data_path", workspace / "train", "--vqgan_path",
        workspace / "tok" / "tokenizer.pt", "--output_dir", workspace / "larger", "--batch_size", 8, "--epochs", 1,
        "--warmup_epochs", 0, "--lr_schedule", "constant", "--num_workers", 0, "--pretrained_ckpt",
        workspace / "lpd" / "checkpoint-last.pth",
    )  # fmt: skip
    config = json.loads((workspace / "larger" / "checkpoint-last.json").read_text())["config"]
    assert (config["img_size"], config["embed_dim"]) == (32, 32)


def test_dry_run_writes_nothing(workspace: Path) -> None:
    arguments = list(training(workspace))
    arguments[arguments.index("--output_dir") + 1] = workspace / "dry"
    assert run(main_lpd.main, *arguments, "--epochs", 2, "--dry_run") == 0
    assert run(main_lpd.main, *evaluation(workspace, "dry"), "--dry_run") == 0
    assert not (workspace / "dry").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--epochs", 0), "--epochs is 0"),
        (("--batch_size", 0), "--batch_size is 0"),
        (("--batch_size", 64), "24 samples"),
        (("--lr", -1), "--lr is -1"),
        (("--warmup_epochs", 3), "--warmup_epochs is 3"),
        (("--model", "lpd_huge"), "lpd_huge"),
        (("--img_size", 24), "16 px"),
        (("--cached_path", "nowhere"), "nowhere"),
        (("--class_num", 1), "--class_num is 1"),
        (("--resume", "nowhere"), "nowhere"),
        (("--pretrained_ckpt", "nowhere.pth"), "nowhere.pth"),
        (("--device", "tpu"), "tpu"),
        (("--recipe", "lpd_m_256"), "lpd_m_256"),
        (("--flip_prob", 2), "--flip_prob is 2"),
        (("--label_drop_prob", -0.1), "label_drop_prob is -0.1"),
        (("--seed", -1), "--seed is -1"),
    ],
)
def test_wrong_training_flags(
    workspace: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], named: str
) -> None:
    """Status 2, one sentence that names the value, nothing written."""
    arguments = list(training(workspace))
    arguments[arguments.index("--output_dir") + 1] = workspace / "wrong"
    assert run(main_lpd.main, *arguments, "--epochs", 2, *flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in message
    assert "error: " in message
    assert not list((workspace / "wrong").glob("*.pth"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--num_images", 0), "--num_images is 0"),
        (("--generation_steps", 17), "17"),
        (("--generation_steps", 0), "0"),
        (("--group_sizes", "1,3"), "4"),
        (("--group_sizes", "__import__('os')"), "__import__"),
        (("--order", "spiral"), "spiral"),
        (("--lpd_order_file", "orders.json"), "orders.json"),
        (("--cfg", 0.5), "cfg is 0.5"),
        (("--cfg_schedule", "cubic"), "cubic"),
        (("--temperature", 0), "temperature is 0"),
        (("--top_k", 17), "top_k is 17"),
        (("--top_p", 1.5), "top_p is 1.5"),
        (("--img_size", 64), "--img_size says 64"),
        (("--class_num", 3), "--class_num says 3"),
        (("--model", "lpd_l"), "--model lpd_l"),
        (("--pretrained_ckpt", "nowhere.pth"), "nowhere.pth"),
        (("--vqgan_path", "nowhere.pt"), "nowhere.pt"),
        (("--reference_statistics", "nowhere.npz"), "nowhere.npz"),
        (("--feature_extractor", "nowhere.pt"), "nowhere.pt"),
    ],
)
def test_wrong_evaluation_flags(
    workspace: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], named: str
) -> None:
    assert run(main_lpd.main, *evaluation(workspace, "wrong"), *flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in message
    assert "error: " in message


def test_missing_inputs_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        ((), "--data_path"),
        (("--use_cached",), "--cached_path"),
        (("--evaluate",), "--pretrained_ckpt"),
    ):
        assert run(main_lpd.main, *arguments) == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize("name", EVAL_RECIPES)
def test_evaluation_recipes_parse_and_build(name: str) -> None:
    """Every published row is a valid command line for a model of its size."""
    args = parse(["--evaluate", "--recipe", name, "--eval_bsz", "8"])
    assert args.eval_bsz == 8
    assert isinstance(args.pretrained_ckpt, Path)
    assert sum(group_sizes(args.img_size, args.generation_steps)) == (args.img_size // 16) ** 2
    with torch.device("meta"):
        assert model_config(args.model, img_size=args.img_size).num_tokens == (args.img_size // 16) ** 2
    assert EXPECTED[name].fid < 3
    assert (Path(__file__).parents[1] / "scripts" / "eval" / f"{name}.sh").is_file()


@pytest.mark.parametrize("name", TRAIN_RECIPES)
def test_training_recipes_parse(name: str) -> None:
    from engine.options import train_config

    config = train_config(parse(["--recipe", name]))
    assert config.epochs in (50, 450)
    assert (Path(__file__).parents[1] / "scripts" / "train" / f"{name}.sh").is_file()
