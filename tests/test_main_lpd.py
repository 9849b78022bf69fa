"""The commands as a user types them: the demo's path with a few steps, and wrong arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine.classifier
import engine.evaluation.results_table
import engine.metrics
import main_cache
import main_lpd
import tokenizers.train
from engine.hub.__main__ import main as hub_main
from models.lpd import resize_pos_embed
from tests.helpers.commands import run
from tests.helpers.pictures import assert_not_blank, assert_shows, pixels_of
from tests.helpers.processes import holder
from util.checkpoint import load_checkpoint, save_checkpoint

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
    images = [pixels_of(path) for path in sorted((workspace / "eval" / "images").glob("*.png"))]
    assert len(images) == 20
    assert_shows(workspace / "eval" / "grid.png", images[:8] + images[10:18], columns=8).assert_labelled()
    settings = json.loads((workspace / "eval" / "eval_settings.json").read_text())
    assert settings["model"]["vocab_size"] == 16


def test_exported_model_evaluates_as_its_checkpoint(workspace: Path) -> None:
    """A folder to share holds all that an evaluation needs: weights, sizes, names of the classes, the tokenizer."""
    folder = workspace / "exported"
    checkpoint = workspace / "lpd" / "checkpoint-last.pth"
    assert run(hub_main, "export", checkpoint, folder, "--vqgan_path", workspace / "tok" / "tokenizer.pt") == 0
    assert run(main_lpd.main, *evaluation(workspace, "of_checkpoint")) == 0
    flags = list(evaluation(workspace, "of_export"))
    del flags[(given := flags.index("--vqgan_path")) : given + 2]
    assert run(main_lpd.main, *flags, "--pretrained_ckpt", folder) == 0
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
    printed = capsys.readouterr().out
    assert "evaluation  20 images, 4 steps, order lpd, guidance 2" in printed
    assert "all of them: " + str(workspace / "recipe" / "eval_settings.json") in printed
    announced = json.loads((workspace / "recipe" / "eval_settings.json").read_text())
    assert announced["published"]["fid"] == 2.40
    assert announced["settings"]["repulsion_threshold"] == 2
    record = json.loads((workspace / "recipe" / "results.json").read_text())["record"]
    assert (record["recipe"], record["expected"]["inception_score"]) == ("lpd_l_res256_steps20", 284.5)
    changed = {"model": "lpd_debug", "img_size": 16, "generation_steps": 4, "cfg": 2.0, "num_images": 20}
    classifier = str(workspace / "classifier.pt")
    assert record["changed"] == changed | {"bf16": False, "feature_extractor": classifier}


def test_training_again_continues_or_says_it_is_finished(workspace: Path) -> None:
    """The same command resumes by itself; with more epochs it resumes from where it was."""
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


def test_pictures_have_the_tokenizers_size_unless_another_is_given(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against small pictures being cropped and encoded at 256 px in silence."""
    files = ("--data_path", workspace / "train", "--vqgan_path", workspace / "tok" / "tokenizer.pt")
    for size, flags in ((16, ()), (32, ("--img_size", 32))):
        cache = workspace / f"codes{size}"
        assert run(main_cache.main, *files, "--cached_path", cache, "--num_workers", 0, *flags) == 0
        assert json.loads((cache / "header.json").read_text())["img_size"] == size
        warned = "the tokenizer was trained on pictures of 16 px, those to encode have 32 px" in capsys.readouterr().err
        assert warned == (size == 32)
        training = ("--model", "lpd_debug", *files, "--output_dir", workspace / "none", "--batch_size", 8, "--dry_run")
        assert run(main_lpd.main, *training, *flags) == 0
        output = capsys.readouterr()
        assert json.loads(output.out)["model"]["img_size"] == size
        assert ("trained on pictures of 16 px" in output.err) == (size == 32)


def test_the_command_for_a_missing_cache_leaves_the_size_to_the_tokenizer(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--vqgan_path", workspace / "tok" / "tokenizer.pt", "--data_path", workspace / "train")
    assert run(main_lpd.main, "--use_cached", "--cached_path", "nowhere", *files) == 2
    assert "make them with: python main_cache.py --vqgan_path" in capsys.readouterr().err
    assert run(main_lpd.main, "--use_cached", "--cached_path", "nowhere", *files, *SIZE) == 2
    assert "make them with: python main_cache.py --img_size 16 --vqgan_path" in capsys.readouterr().err


def test_a_short_run_needs_no_flags_of_the_schedule(workspace: Path) -> None:
    """Guards against defaults that fit the published runs only."""
    assert not run(
        main_lpd.main, "--model", "lpd_debug", "--use_cached", "--cached_path", workspace / "codes", "--output_dir",
        workspace / "short", "--batch_size", 8, "--num_workers", 0, "--epochs", 5,
    )  # fmt: skip
    assert json.loads((workspace / "short" / "checkpoint-last.json").read_text())["epoch"] == 5


def test_training_from_images_with_online_evaluation(workspace: Path) -> None:
    assert not run(
        main_lpd.main, "--model", "lpd_debug", *SIZE, "--data_path", workspace / "train", "--vqgan_path",
        workspace / "tok" / "tokenizer.pt", "--output_dir", workspace / "images", "--batch_size", 8, "--epochs", 1,
        "--warmup_epochs", 0, "--lr_schedule", "constant", "--num_workers", 0, "--online_eval", "--num_images", 10,
        "--eval_bsz", 10, "--generation_steps", 4, "--feature_extractor", "none",
    )  # fmt: skip
    results = json.loads((workspace / "images" / "eval_epoch0001" / "results.json").read_text())
    assert (results["num_images"], results["record"]["step"]) == (10, 3)
    assert_not_blank(workspace / "images" / "eval_epoch0001" / "grid.png")


def test_fine_tuning_from_weights_at_another_resolution(workspace: Path) -> None:
    """--pretrained_ckpt starts a new run from a checkpoint and resizes its positions."""
    assert not run(
        main_lpd.main, "--img_size", 32, "--data_path", workspace / "train", "--vqgan_path",
        workspace / "tok" / "tokenizer.pt", "--output_dir", workspace / "larger", "--batch_size", 8, "--epochs", 1,
        "--warmup_epochs", 0, "--lr_schedule", "constant", "--num_workers", 0, "--pretrained_ckpt",
        workspace / "lpd" / "checkpoint-last.pth", "--lr", 1e-9,
    )  # fmt: skip
    first, second = (load_checkpoint(workspace / name / "checkpoint-last.pth") for name in ("lpd", "larger"))
    assert (second["config"]["img_size"], second["config"]["embed_dim"]) == (32, 32)
    assert second["step"] == 3  # of a new run
    for name, value in second["model"].items():
        expected = first["model"][name] if name != "pos_embed" else resize_pos_embed(first["model"][name], 64)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0, msg=name)


def test_fine_tuning_from_an_exported_folder_takes_its_tokenizer(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint = workspace / "to_tune", workspace / "lpd" / "checkpoint-last.pth"
    flags = (
        "--data_path", workspace / "train", "--pretrained_ckpt", folder, "--output_dir", workspace / "tuned",
        "--batch_size", 8, "--epochs", 1, "--warmup_epochs", 0, "--lr_schedule", "constant", "--num_workers", 0,
    )  # fmt: skip
    assert run(hub_main, "export", checkpoint, folder) == 0
    assert run(main_lpd.main, *flags, "--dry_run") == 2
    assert "to_tune holds no tokenizer" in capsys.readouterr().err
    assert run(hub_main, "export", checkpoint, folder, "--vqgan_path", workspace / "tok" / "tokenizer.pt") == 0
    assert run(main_lpd.main, *flags) == 0
    tuned = load_checkpoint(workspace / "tuned" / "checkpoint-last.pth")
    assert tuned["tokenizer_sha256"] == load_checkpoint(checkpoint)["tokenizer_sha256"]


def test_dry_run_writes_nothing(workspace: Path) -> None:
    arguments = list(training(workspace))
    arguments[arguments.index("--output_dir") + 1] = workspace / "dry"
    assert run(main_lpd.main, *arguments, "--epochs", 2, "--dry_run") == 0
    assert run(main_lpd.main, *evaluation(workspace, "dry"), "--dry_run") == 0
    assert not (workspace / "dry").exists()


def test_dry_run_downloads_nothing(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("a download started")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", never)
    with_inception = (*evaluation(workspace, "dry"), "--feature_extractor", "inception-v3-compat", "--dry_run")
    assert run(main_lpd.main, *with_inception) == 0
    assert "Inception weights will be downloaded" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_command_that_writes_a_folder_refuses_one_in_use(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against two processes that write over each other's files, or delete each other's partial results."""
    folder, tokenizer = workspace / "in_use", workspace / "tok" / "tokenizer.pt"
    data = ("--data_path", workspace / "train", *SIZE, "--num_workers", 0)
    commands: list[tuple[Callable[[], None], tuple[object, ...]]] = [
        (main_lpd.main, (*training(workspace), "--output_dir", folder, "--epochs", 1)),
        (main_lpd.main, evaluation(workspace, "in_use")),
        (main_cache.main, (*data, "--vqgan_path", tokenizer, "--cached_path", folder)),
        (tokenizers.train.main, (*data, "--output_dir", folder, "--stride", 4, "--steps", 1)),
    ]
    with holder(folder):
        for main, arguments in commands:
            assert run(main, *arguments) == 2
            message = capsys.readouterr().err.splitlines()[-1]
            assert message.startswith(f"error: another process is writing to {folder}")
        assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--epochs", 0), "--epochs is 0"),
        (("--batch_size", 0), "--batch_size is 0"),
        (("--batch_size", 64), "24 samples"),
        (("--lr", -1), "--lr is -1"),
        (("--warmup_epochs", 3), "--warmup_epochs is 3"),
        (("--model", "lpd_huge"), "--model is 'lpd_huge'"),
        (("--img_size", 24), "made at 16 px, not 24 px"),
        (("--cached_path", "nowhere"), "missing file nowhere: codes of the training images"),
        (("--class_num", 1), "--class_num is 1"),
        (("--resume", "nowhere.pth"), "--resume nowhere.pth does not exist"),
        (("--pretrained_ckpt", "nowhere.pth"), "missing file nowhere.pth: a checkpoint"),
        (("--device", "tpu"), "the device 'tpu'"),
        (("--recipe", "lpd_m_256"), "no training recipe 'lpd_m_256'"),
        (("--flip_prob", 2), "--flip_prob is 2"),
        (("--label_drop_prob", -0.1), "label_drop_prob is -0.1"),
        (("--seed", -1), "--seed is -1"),
        (("--min_lr", "nan"), "--min_lr is nan"),
        (("--img_size", 0), "--img_size is 0; it must be at least 1"),
        (("--class_num", 0), "class_num is 0"),
        (("--vqgan_path", "nowhere.pt"), "missing file nowhere.pt: a tokenizer"),
        (
            ("--online_eval", "--generation_steps", 4, "--reference_statistics", "nowhere.npz"),
            "missing file nowhere.npz",
        ),
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
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert named in message
    assert not (workspace / "wrong").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--num_images", 0), "--num_images is 0"),
        (("--generation_steps", 17), "number of steps 17"),
        (("--generation_steps", 0), "generation_steps is 0; it must be at least 1"),
        (("--group_sizes", "1,3"), "sum to 4, but the grid has 16 tokens"),
        (("--group_sizes", "__import__('os')"), "must be positive integers"),
        (("--order", "spiral"), "order is 'spiral'"),
        (("--lpd_order_file", "orders.json"), "missing file orders.json: a file of orders"),
        (("--order", "raster", "--lpd_order_file", "orders.json"), "the order file orders.json exclude each other"),
        (("--cfg", 0.5), "cfg is 0.5"),
        (("--cfg_schedule", "cubic"), "cfg_schedule is 'cubic'"),
        (("--temperature", 0), "temperature is 0"),
        (("--top_k", 17), "top_k is 17"),
        (("--top_p", 1.5), "top_p is 1.5"),
        (("--img_size", 64), "--img_size says 64"),
        (("--class_num", 3), "--class_num says 3"),
        (("--model", "lpd_l"), "--model lpd_l"),
        (("--pretrained_ckpt", "nowhere.pth"), "missing file nowhere.pth: a checkpoint"),
        (("--vqgan_path", "nowhere.pt"), "missing file nowhere.pt: a tokenizer"),
        (("--reference_statistics", "nowhere.npz"), "missing file nowhere.npz: reference statistics"),
        (("--feature_extractor", "nowhere.pt"), "missing file nowhere.pt: a feature extractor"),
        (("--repulsion_threshold", -1), "repulsion_threshold is -1; it must be at least 0"),
        (("--cfg", "inf"), "cfg is inf"),
    ],
)
def test_wrong_evaluation_flags(
    workspace: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], named: str
) -> None:
    assert run(main_lpd.main, *evaluation(workspace, "wrong"), *flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert named in message
    assert not (workspace / "wrong").exists()


def test_swapped_files_and_unusable_folders(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer or classifier in place of the checkpoint, a file in place of a folder."""
    for name in ("tok/tokenizer.pt", "classifier.pt"):
        assert run(main_lpd.main, *evaluation(workspace, "wrong"), "--pretrained_ckpt", workspace / name) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: {workspace / name}: the checkpoint is not one of an LPD model")
    # And the other way round:
    for file, said in (
        (workspace / "lpd" / "checkpoint-last.pth", "is a checkpoint of an LPD model, not a tokenizer"),
        (workspace / "classifier.pt", "is not a tokenizer: its config has arch, input_size, num_classes"),
    ):
        assert run(main_lpd.main, *evaluation(workspace, "wrong"), "--vqgan_path", file) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {file} {said}")
    for arguments in (training(workspace), evaluation(workspace, "wrong")):
        assert run(main_lpd.main, *arguments, "--output_dir", workspace / "classifier.pt") == 2
        assert "is a file" in capsys.readouterr().err


def test_resuming_with_another_batch_or_tokenizer_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps of a run are counted in its global batches; its codes belong to its tokenizer."""
    settings = (workspace / "lpd" / "train_settings.json").read_text()
    assert run(main_lpd.main, *training(workspace), "--epochs", 3, "--batch_size", 4) == 2
    assert (workspace / "lpd" / "train_settings.json").read_text() == settings, "a refused start leaves no record"
    checkpoint = workspace / "lpd" / "checkpoint-last.pth"
    said = capsys.readouterr().err
    assert f"error: checkpoint {checkpoint} is of a run with global_batch 8 (--batch_size × --grad_accum" in said
    assert "another --output_dir" in said
    assert run(main_lpd.main, *training(workspace), "--epochs", 3, "--model", "lpd_tiny") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {checkpoint}: the checkpoint is of a model with embed_dim 32, but --model lpd_tiny")
    assert said.endswith("This run is resumed from it; for a new one give another --output_dir.")
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
    assert run(main_lpd.main, *evaluation(workspace, "classes/eval"), *flags, "--save_images") == 0
    checkpoint = load_checkpoint(folder / "checkpoint-last.pth")
    assert (checkpoint["config"]["class_num"], checkpoint["classes"]) == (4, ["dark", "light"])
    images = [pixels_of(path) for path in sorted((folder / "eval" / "images").glob("*.png"))]
    assert_shows(folder / "eval" / "grid.png", images, columns=5).assert_labelled()
    assert "class_accuracy" not in json.loads((folder / "eval" / "results.json").read_text())  # it knows two classes


def test_missing_inputs_are_asked_for_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = "--vqgan_path is missing; give the tokenizer"
    for arguments, named in (
        ((), ["give training data: --data_path", tokenizer]),
        (("--use_cached", "--new_classes"), ["--use_cached needs --cached_path", "--new_classes needs --pretrained"]),
        (("--use_cached",), ["--use_cached needs --cached_path"]),
        (("--vqgan_path", "nowhere.pt"), ["give training data: --data_path", "missing file nowhere.pt: a tokenizer"]),
        (("--evaluate",), ["--evaluate needs --pretrained_ckpt", tokenizer]),
    ):
        assert run(main_lpd.main, *arguments) == 2
        error, *lines = capsys.readouterr().err.splitlines()
        if len(named) > 1:
            assert error == f"error: {len(named)} errors on the command line:"
        else:
            lines = [error.removeprefix("error: ")]
        assert [line.strip().startswith(start) for line, start in zip(lines, named, strict=True)] == [True] * len(named)
