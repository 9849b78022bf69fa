"""The commands as a user types them: the demo's path with a few steps, and wrong arguments."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import engine.classifier
import engine.evaluation.results_table
import engine.metrics
import main_cache
import main_lpd
import tokenizers.train
from engine.hub.__main__ import main as hub_main
from engine.options import parse
from engine.recipes import EVAL_RECIPES, EXPECTED, TRAIN_RECIPES
from models import model_config
from tests.helpers.commands import ROOT, run
from util.checkpoint import load_checkpoint, save_checkpoint
from util.config import record

SIZE = ("--img_size", "16")


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


def test_exported_model_evaluates_as_its_checkpoint(workspace: Path) -> None:
    """A folder to share holds all that an evaluation needs: weights, sizes, names of the classes, the tokenizer."""
    folder = workspace / "exported"
    checkpoint = workspace / "lpd" / "checkpoint-last.pth"
    assert run(hub_main, "export", checkpoint, folder, "--vqgan_path", workspace / "tok" / "tokenizer.pt") == 0
    assert run(main_lpd.main, *evaluation(workspace, "of_checkpoint")) == 0
    names = ("--pretrained_ckpt", folder, "--vqgan_path", folder)
    assert run(main_lpd.main, *evaluation(workspace, "of_export"), *names) == 0
    results = [json.loads((workspace / of / "results.json").read_text()) for of in ("of_checkpoint", "of_export")]
    for figure in ("frechet_distance", "inception_score", "class_accuracy", "model"):
        assert results[0][figure] == results[1][figure]
    assert results[1]["record"]["pretrained_ckpt"]["path"] == str(folder / "model.safetensors")
    assert run(engine.evaluation.results_table.main, workspace / "of_checkpoint", workspace / "of_export") == 0


def test_a_recipe_is_announced_and_recorded_with_its_changes(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags behind a recipe win, and the results do not pass for those of the published run."""
    flags = ("--recipe", "lpd_l_res256_steps20", "--model", "lpd_debug", *SIZE, "--no-bf16", "--speed_runs", 0)
    assert run(main_lpd.main, *evaluation(workspace, "recipe"), *flags) == 0
    announced, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    assert announced == json.loads((workspace / "recipe" / "eval_settings.json").read_text())
    assert announced["published"]["fid"] == 2.40
    assert announced["settings"]["repulsion_threshold"] == 2
    record = json.loads((workspace / "recipe" / "results.json").read_text())["record"]
    assert (record["recipe"], record["expected"]["inception_score"]) == ("lpd_l_res256_steps20", 284.5)
    changed = {"model": "lpd_debug", "img_size": 16, "generation_steps": 4, "cfg": 2.0, "num_images": 20}
    classifier = str(workspace / "classifier.pt")
    assert record["changed"] == changed | {"bf16": False, "feature_extractor": classifier}


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
        (("--resume", "nowhere.pth"), "nowhere.pth"),
        (("--pretrained_ckpt", "nowhere.pth"), "nowhere.pth"),
        (("--device", "tpu"), "tpu"),
        (("--recipe", "lpd_m_256"), "lpd_m_256"),
        (("--flip_prob", 2), "--flip_prob is 2"),
        (("--label_drop_prob", -0.1), "label_drop_prob is -0.1"),
        (("--seed", -1), "--seed is -1"),
        (("--min_lr", "nan"), "--min_lr is nan"),
        (("--img_size", 0), "0"),
        (("--class_num", 0), "class_num is 0"),
        (("--vqgan_path", "nowhere.pt"), "nowhere.pt"),
        (("--online_eval", "--generation_steps", 4, "--reference_statistics", "nowhere.npz"), "nowhere.npz"),
        (("--online_eval", "--generation_steps", 4, "--cfg", 0.5), "cfg is 0.5"),
        (("--online_eval",), "number of steps 20"),
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
    assert not (workspace / "wrong").exists()


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
        (("--repulsion_threshold", -1), "-1"),
        (("--cfg", "inf"), "cfg is inf"),
    ],
)
def test_wrong_evaluation_flags(
    workspace: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], named: str
) -> None:
    assert run(main_lpd.main, *evaluation(workspace, "wrong"), "--dry_run", *flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in message
    assert "error: " in message


def test_swapped_files_and_unusable_folders(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer or classifier in place of the checkpoint, a file in place of a folder."""
    for name in ("tok/tokenizer.pt", "classifier.pt"):
        assert run(main_lpd.main, *evaluation(workspace, "wrong"), "--pretrained_ckpt", workspace / name) == 2
        assert "error: " in capsys.readouterr().err
    for arguments in (training(workspace), evaluation(workspace, "wrong")):
        assert run(main_lpd.main, *arguments, "--output_dir", workspace / "classifier.pt") == 2
        assert "is a file" in capsys.readouterr().err


def test_resuming_with_another_batch_or_tokenizer_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps of a run are counted in its global batches; its codes belong to its tokenizer."""
    assert run(main_lpd.main, *training(workspace), "--epochs", 3, "--batch_size", 4) == 2
    assert "global_batch 8 (--batch_size × --grad_accum × processes), this one has 4" in capsys.readouterr().err
    other = load_checkpoint(workspace / "lpd" / "checkpoint-last.pth") | {"tokenizer_sha256": "f" * 64}
    save_checkpoint(workspace / "other.pth", other)
    arguments = (*training(workspace), "--output_dir", workspace / "wrong", "--epochs", 3)
    assert run(main_lpd.main, *arguments, "--pretrained_ckpt", workspace / "other.pth") == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_more_classes_than_the_data_has(workspace: Path) -> None:
    """--class_num above the data set's trains and evaluates; the classes without pictures get numbers for names."""
    folder = workspace / "classes"
    arguments = (*training(workspace), "--output_dir", folder, "--epochs", 1, "--class_num", 4)
    assert run(main_lpd.main, *arguments, "--bf16") == 0
    flags = ("--pretrained_ckpt", folder / "checkpoint-last.pth", "--bf16")
    assert run(main_lpd.main, *evaluation(workspace, "classes/eval"), *flags) == 0


def test_missing_inputs_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        ((), "--data_path"),
        (("--use_cached",), "--cached_path"),
        (("--evaluate",), "--pretrained_ckpt"),
    ):
        assert run(main_lpd.main, *arguments) == 2
        assert named in capsys.readouterr().err


# Model, pixels, steps, repulsion, guidance; FID, Inception Score, seconds at batch 1, images/s at batch 64 (paper).
PUBLISHED_ROWS = {
    "lpd_l_res256_steps20": ("lpd_l", 256, 20, 2, 4.8, 2.40, 284.5, 0.28, 139.11),
    "lpd_xl_res256_steps20": ("lpd_xl", 256, 20, 2, 4.9, 2.10, 326.7, 0.41, 75.20),
    "lpd_xxl_res256_steps20": ("lpd_xxl", 256, 20, 3, 5.9, 2.00, 337.6, 0.55, 45.07),
    "lpd_l_res256_steps32": ("lpd_l", 256, 32, 2, 5.4, 2.29, 282.7, 0.46, 110.34),
    "lpd_xl_res256_steps32": ("lpd_xl", 256, 32, 2, 5.0, 1.92, 319.4, 0.66, 61.24),
    "lpd_l_res512_steps48": ("lpd_l", 512, 48, 4, 7.3, 2.54, 292.2, 0.69, 35.16),
    "lpd_xl_res512_steps48": ("lpd_xl", 512, 48, 4, 6.0, 2.10, 326.0, 1.01, 18.18),
}
# Model, pixels, epochs, warm-up, schedule, decay from, images per GPU.
PUBLISHED_RUNS = {
    "lpd_l_256": ("lpd_l", 256, 450, 50, "constant+cosine", 400, 64),
    "lpd_xl_256": ("lpd_xl", 256, 450, 50, "constant+cosine", 400, 32),
    "lpd_xxl_256": ("lpd_xxl", 256, 450, 50, "constant+cosine", 400, 32),
    "lpd_l_512": ("lpd_l", 512, 50, 1, "cosine", None, 16),
    "lpd_xl_512": ("lpd_xl", 512, 50, 1, "cosine", None, 8),
}


@pytest.mark.parametrize("name", EVAL_RECIPES)
def test_evaluation_recipes_are_the_published_rows(name: str) -> None:
    """A mistyped guidance or step count would cost a night and look like a bad model."""
    config = parse(["--evaluate", "--recipe", name, "--eval_bsz", "8"])
    args = SimpleNamespace(**record(config))
    sampling = (args.model, args.img_size, args.generation_steps, args.repulsion_threshold, args.cfg)
    assert sampling + dataclasses.astuple(EXPECTED[name]) == PUBLISHED_ROWS[name]
    assert (args.cfg_schedule, args.temperature, args.top_k, args.top_p) == ("linear", 1.0, 0, 1.0)
    assert (args.num_images, args.bf16, args.eval_bsz) == (50_000, True, 8)
    assert isinstance(config.pretrained_ckpt, Path)
    assert model_config(args.model, img_size=args.img_size).num_tokens == (args.img_size // 16) ** 2
    script = (ROOT / "scripts" / "eval" / f"{name}.sh").read_text()
    assert f"--evaluate --recipe {name}" in script


@pytest.mark.parametrize("name", TRAIN_RECIPES)
def test_training_recipes_are_the_published_runs(name: str) -> None:
    parsed = parse(["--recipe", name])
    args, config = SimpleNamespace(**record(parsed)), parsed.training
    assert config is not None
    decay = config.lr_decay_start_epoch if config.lr_schedule == "constant+cosine" else None
    run_of = (args.model, args.img_size, config.epochs, config.warmup_epochs, config.lr_schedule, decay)
    assert (*run_of, config.batch_size) == PUBLISHED_RUNS[name]
    optimisation = (config.lr, config.blr, config.min_lr, config.weight_decay, config.grad_clip, config.bf16)
    assert optimisation == (None, 1e-4, 1e-5, 0.02, 3.0, True)
    assert (args.label_drop_prob, args.proj_dropout, args.attn_dropout) == (0.1, 0.1, 0.0)
    assert f"--recipe {name}" in (ROOT / "scripts" / "train" / f"{name}.sh").read_text()


def test_recipes_cover_the_published_tables() -> None:
    assert EVAL_RECIPES.keys() == PUBLISHED_ROWS.keys()
    assert TRAIN_RECIPES.keys() == PUBLISHED_RUNS.keys()


@pytest.mark.parametrize(
    ("script", "named"),
    [("eval/lpd_l_res256_steps20.sh", "checkpoints/lpd_l_256.pth"), ("train/lpd_l_256.sh", "cached/imagenet_256")],
)
def test_published_scripts_start_and_name_what_is_missing(script: str, named: str) -> None:
    """Without weights or codes a published command ends at once with one sentence and status 2."""
    command = ["bash", str(ROOT / "scripts" / script), "--device", "cpu"]
    environment = os.environ | {"NPROC_PER_NODE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert named in result.stderr
