"""The command that trains tokenizers: its flags, what it says, and what it leaves."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main_cache
import tokenizers.train
from engine.scoring.classifier import Classifier, ClassifierConfig, save_classifier
from engine.tokenizer_training import trainer
from tests.helpers.commands import ROOT, run
from tests.helpers.pictures import pixels_of
from tokenizers import VQConfig, VQModel, load_tokenizer, save_tokenizer
from tokenizers.train import main

SMALL = (
    *("--base_width", "8", "--res_blocks", "1", "--z_channels", "8", "--codebook_size", "8", "--img_size", "16"),
    *("--device", "cpu", "--num_workers", "0"),
)
COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 pictures, 20×24: a class per colour, in the order of the classes, and noise."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for number in range(8):
            path = tmp_path / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.array(colour) + rng.integers(0, 50, (20, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "images"


def _train(photos: Path, out: Path, *flags: object) -> int:
    return run(main, "--data_path", photos, "--output_dir", out, *SMALL, *flags)


def _metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("flags", "stride", "steps"),
    [
        ("--stride 8 --epochs 2 --batch_size 6", 8, 8),
        ("--stride 2 --multipliers 1 1 --steps 2 --bf16 --flip --ema 0", 2, 2),
        ("--stride 4 --steps 2 --img_size 24 --adversarial_weight 0.5 --adversarial_start 0.4 --disc_width 4", 4, 2),
    ],
)
def test_the_command_trains_a_loadable_tokenizer(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, stride: int, steps: int
) -> None:
    assert _train(photos, tmp_path / "out", *flags.split()) == 0
    model = load_tokenizer(tmp_path / "out" / "tokenizer.pt")
    assert (model.stride, model.config.img_size) == (stride, 24 if "24" in flags else 16)
    assert _metrics(tmp_path / "out")["step"] == steps
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert ("adversarial" in line) == ("adversarial" in flags)
    printed = capsys.readouterr()
    assert "dB, SSIM" in printed.out
    assert "far from the pictures" in printed.err  # after so few steps


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "--steps is 0"),
        ("--epochs 0", "--epochs is 0"),
        ("", "either --steps or --epochs"),
        ("--steps 1 --batch_size 0", "--batch_size is 0"),
        ("--steps 1 --batch_size 1000000000", "it must be at least 1 and at most 65536"),
        ("--steps 1 --lr 0", "--lr is 0"),
        ("--steps 1 --held_out 1", "--held_out is 1"),
        ("--steps 1 --eval_freq 0", "--eval_freq is 0"),
        ("--steps 1 --num_workers -1", "--num_workers is -1"),
        ("--steps 1 --seed 4294967296", "--seed is 4294967296"),
        ("--steps 1 --seed -1", "--seed is -1"),
        ("--steps 1 --ema 1", "--ema is 1"),
        ("--steps 1 --adversarial_weight -1", "--adversarial_weight is -1"),
        ("--steps 1 --adversarial_weight 1", "--adversarial_weight needs pictures of at least 24 pixels"),
        ("--steps 1 --adversarial_start 1", "--adversarial_start is 1"),
        ("--steps 1 --disc_lr 0", "--disc_lr is 0"),
        ("--steps 1 --lpips_path nowhere.pth", "nowhere.pth does not exist"),
        ("--steps 1 --vqgan_path nowhere.pt", "nowhere.pt does not exist"),
        ("--steps 1 --feature_extractor nowhere.pt", "'nowhere.pt' is neither"),
        ("--steps 1 --base_width 6", "base_width 6"),
        ("--steps 1 --codebook_size 0", "codebook_size 0"),
        ("--steps 1 --multipliers 1 2", "--multipliers"),
        ("--steps 1 --img_size 24 --stride 16", "--img_size 24"),
        ("--steps 1 --stride 3", "--stride is 3"),
        ("--steps 1 --device tpu", "tpu"),
        ("--steps 1 --data_path nowhere", "nowhere"),
        ("--steps 1 --test_path nowhere", "nowhere"),
    ],
)
def test_a_wrong_argument_is_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    """Each must end with one sentence before anything is written."""
    assert _train(photos, tmp_path / "out", *flags.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_named_and_skipped_only_on_request(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "red" / "0.png").write_bytes(b"broken")
    assert _train(photos, tmp_path / "out", "--steps", 1, "--num_workers", 2) == 2
    assert "0.png" in capsys.readouterr().err.splitlines()[-1]
    assert _train(photos, tmp_path / "out", "--steps", 1, "--num_workers", 2, "--skip_broken") == 0
    load_tokenizer(tmp_path / "out" / "tokenizer.pt")


@pytest.mark.parametrize("flags", ["--steps 3", "--steps 60 --eval_freq 100", "--steps 60 --bf16"])
def test_a_training_that_diverges_says_so_and_saves_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    """Guards against NaN weights that caches are then made with, also where entries are revived first."""
    assert _train(photos, tmp_path / "out", "--lr", "1e30", *flags.split()) == 1
    assert "no longer finite at step" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl"}
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == ""


def test_reconstructions_are_shown_of_all_classes(photos: Path, tmp_path: Path) -> None:
    """Test sets are ordered by class: the first twelve would be of one."""
    assert _train(photos, tmp_path / "out", "--steps", 1, "--test_path", photos) == 0
    pixels = pixels_of(tmp_path / "out" / "reconstructions.png").reshape(-1, 3).astype(int)
    for channel, name in ((2, "blue"), (1, "green"), (0, "red")):
        others = np.delete(pixels, channel, axis=1).max(1)
        assert ((pixels[:, channel] > 180) & (others < 60)).sum() > 12 * 16 * 16, (
            name
        )  # four enlarged pictures and more


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig("test_resnet", 3, 16, 16)).eval()
    save_classifier(model, tuple(COLOURS), tmp_path / "classifier.pt")
    return tmp_path / "classifier.pt"


def test_a_classifier_judges_at_the_end(
    photos: Path, tmp_path: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _train(photos, out, "--steps", 2, "--feature_extractor", classifier) == 0
    printed, metrics = capsys.readouterr(), _metrics(out)
    for name in ("class_accuracy", "frechet_distance"):
        assert metrics[f"{name}_real"] >= 0
        assert metrics[f"{name}_reconstructed"] >= 0
    assert "Fréchet distance to the training images" in printed.out
    assert f"read as their class {metrics['class_accuracy_reconstructed']:.1%}" in printed.out
    quality = torch.load(out / "tokenizer.pt", weights_only=True)["quality"]
    assert quality == {name: metrics[name] for name in trainer.QUALITY}
    assert "--feature_extractor" not in printed.err  # no advice to do what has been done
    # What is made with it begins with a line of what it is worth.
    words = ("--data_path", photos, "--cached_path", tmp_path / "codes", "--device", "cpu", "--num_workers", 0)
    assert run(main_cache.main, "--vqgan_path", out / "tokenizer.pt", *words) == 0
    line = f"tokenizer: PSNR {metrics['psnr_db']:.1f} dB, SSIM {metrics['ssim']:.2f} on held-out pictures; its"
    assert line in capsys.readouterr().err
    # Other classes: distances only.
    shutil.move(photos / "red", photos / "yellow")
    assert _train(photos, tmp_path / "other", "--steps", 2, "--feature_extractor", classifier) == 0
    assert "has other classes than the images" in capsys.readouterr().err
    assert "class_accuracy_real" not in _metrics(tmp_path / "other")


def test_a_finished_training_is_extended_and_damaged_lines_do_no_harm(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _train(photos, out, "--steps", 2) == 0
    before = (out / "tokenizer.pt").read_bytes()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": 2}\n{"st')
    assert _train(photos, out, "--steps", 2) == 0
    assert "the training is finished" in capsys.readouterr().err
    assert (out / "tokenizer.pt").read_bytes() == before
    assert _train(photos, out, "--steps", 1) == 2
    assert "trained with steps 2, not 1; give at least 2" in capsys.readouterr().err.splitlines()[-1]
    (out / "metrics.jsonl").write_text("")
    assert _train(photos, out, "--steps", 4) == 0
    assert _metrics(out)["step"] == 4
    assert "resuming at step 2 of 4" in capsys.readouterr().err


def test_fine_tuning_takes_sizes_from_the_tokenizer(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = VQConfig(base_width=12, multipliers=(1, 2), res_blocks=1, z_channels=4, codebook_size=9, code_dim=3)
    save_tokenizer(VQModel(start), tmp_path / "start.pt")
    words = ["--vqgan_path", tmp_path / "start.pt", "--data_path", photos, "--steps", 1, "--device", "cpu"]
    words += ["--num_workers", 0]
    assert run(main, *words, "--output_dir", tmp_path / "out", "--img_size", 12) == 0
    assert load_tokenizer(tmp_path / "out" / "tokenizer.pt").config == VQConfig(**{**vars(start), "img_size": 12})
    # The size of the pictures of one that records it is the default too.
    words[1] = tmp_path / "out" / "tokenizer.pt"
    assert run(main, *words, "--output_dir", tmp_path / "next") == 0
    assert load_tokenizer(tmp_path / "next" / "tokenizer.pt").config.img_size == 12
    for flags, message in (("--code_dim 4", "has code_dim 3, not 4"), ("--stride 4", "has stride 2; leave out")):
        assert run(main, *words, "--output_dir", tmp_path / "other", *flags.split()) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "other").exists()
    # LlamaGen's file names no size; it has the released one.
    monkeypatch.setattr("tokenizers.checkpoint.VQConfig", lambda: start)
    torch.save(VQModel(start).state_dict(), tmp_path / "released.pt")
    words[1] = tmp_path / "released.pt"
    assert run(main, *words, "--output_dir", tmp_path / "released", "--img_size", 16) == 0
    assert _metrics(tmp_path / "released")["tokenizer"]["codebook_size"] == 9


@pytest.mark.parametrize("stage", ["open_images", "train_tokenizer", "ImageReading", "judge"])
def test_sigterm_at_any_stage_asks_for_the_same_command_again(
    photos: Path, tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Status 75, which a cluster answers by starting it again; the training's own steps have tests of their own."""
    flags = ("--steps", 2, "--feature_extractor", classifier)
    place: Any = tokenizers.train
    name = stage
    if stage == "ImageReading":
        place, name = trainer, "load_all"
    real = getattr(place, name)
    calls = iter(range(100))

    def told(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, told)
        assert _train(photos, tmp_path / "out", *flags) == 75
    assert _train(photos, tmp_path / "out", *flags) == 0
    assert _metrics(tmp_path / "out")["class_accuracy_real"] >= 0


@pytest.mark.slow
def test_a_stopped_command_leaves_no_readers(photos: Path, tmp_path: Path) -> None:
    """Guards against a process that waits for its readers for ever; they read what does not fit into memory."""
    script = (
        "import sys; from engine.tokenizer_training import data; data._IN_MEMORY_BYTES = 0; from tokenizers.train "
        "import main; from util.cli import exit_on_user_error; exit_on_user_error(main)"
    )
    flags = ["--data_path", photos, "--output_dir", tmp_path / "out", *SMALL, "--num_workers", "2", "--steps", "100000"]
    command = [sys.executable, "-c", script, *map(str, flags)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stderr is not None
        text = ""
        while "1/100000" not in text:
            text = text[-20:] + process.stderr.read(1)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=120)
    assert process.returncode == 75, rest
    assert (tmp_path / "out" / "state.pth").exists()
