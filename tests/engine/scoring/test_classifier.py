"""The classifier that serves as feature extractor: training, its file, and its command."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import classifier
from engine.scoring.classifier import (
    Classifier,
    ClassifierConfig,
    load_classifier,
    save_classifier,
)
from engine.scoring.classifier_training import ClassifierTrainConfig, ClassifierTraining, augment
from engine.scoring.features import load_feature_extractor
from tests.helpers.commands import run
from util.errors import UserError
from util.files import sha256

STILL = ClassifierTrainConfig(shift=0, rotate=0, scale=0)


def write_stripes(folder: Path, num: int, seed: int, classes: tuple[str, ...] = ("across", "down")) -> None:
    """Noisy 16×16 pictures of horizontal and of vertical stripes."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            wave = 127 + 100 * np.sin(np.arange(16) + rng.uniform(0, 6))
            pixels = np.broadcast_to(wave, (16, 16)) if label else np.broadcast_to(wave[:, None], (16, 16))
            noisy = pixels[..., None] + rng.normal(0, 5, (16, 16, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def network() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig("test_resnet", num_classes=3, img_size=16, input_size=24)).eval()


def test_command_trains_a_classifier_that_reads_held_out_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stripes(tmp_path / "train", 32, seed=0)
    write_stripes(tmp_path / "test", 10, seed=1)
    output = tmp_path / "stripes.pt"
    flags = f"--data_path {tmp_path}/train --test_path {tmp_path}/test --output {output} --img_size 16 --input_size 32"
    flags += " --epochs 12 --batch_size 16 --rotate 5 --device cpu"
    monkeypatch.setattr(sys, "argv", ["classifier", *flags.split()])
    classifier.main()
    metadata = json.loads(capsys.readouterr().out)
    assert metadata["test_accuracy"] >= 0.9
    assert metadata["test_images"] == 20
    assert torch.load(output, weights_only=True)["metadata"] == metadata
    extractor = load_feature_extractor(str(output))
    assert extractor.classes == ("across", "down")
    assert extractor.weights_hash == sha256(output)
    features, logits = extractor(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert features.shape == (2, extractor.feature_dim)
    assert logits.shape == (2, 2)


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_training_that_diverges_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: int
) -> None:
    """Guards against NaN weights that later evaluations use; after one step weights are only far too large."""
    write_stripes(tmp_path / "train", 4, seed=0)
    flags = f"--data_path {tmp_path}/train --test_path {tmp_path}/train --output {tmp_path}/c.pt --img_size 16"
    flags += f" --epochs {epochs} --lr 1e30 --device cpu"
    assert run(classifier.main, *flags.split()) == 1
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("c.pt*"))


def test_a_damaged_state_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_stripes(tmp_path / "train", 4, seed=0)
    (tmp_path / "c.pt.state.pth").write_bytes(b"PK damaged")
    flags = f"--data_path {tmp_path}/train --test_path {tmp_path}/train --output {tmp_path}/c.pt --img_size 16"
    assert run(classifier.main, *flags.split(), "--epochs", 1, "--device", "cpu") == 0
    assert "The training starts from the beginning" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("c.pt*")] == ["c.pt"]


@pytest.mark.parametrize("stop_at", [1, 4, 8, 11])
def test_a_stopped_training_ends_as_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Bit for bit, in the middle of an epoch and at its end."""
    write_stripes(tmp_path / "train", 16, seed=0)
    flags = f"--data_path {tmp_path}/train --test_path {tmp_path}/train --img_size 16 --epochs 3 --batch_size 8".split()
    flags += ["--device", "cpu"]
    assert run(classifier.main, *flags, "--output", tmp_path / "whole.pt") == 0
    step, steps = ClassifierTraining._step, []

    def stopping(self: ClassifierTraining, rows: torch.Tensor) -> torch.Tensor:
        steps.append(rows)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, rows)

    monkeypatch.setattr(ClassifierTraining, "_step", stopping)
    assert run(classifier.main, *flags, "--output", tmp_path / "parts.pt") == 75
    assert run(classifier.main, *flags, "--output", tmp_path / "parts.pt") == 0
    assert len(steps) == 3 * 4
    whole, parts = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("whole.pt", "parts.pt"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not (tmp_path / "parts.pt.state.pth").exists()
    # Finished: left alone; of another training: refused.
    capsys.readouterr()
    assert run(classifier.main, *flags, "--output", tmp_path / "parts.pt") == 0
    assert len(steps) == 3 * 4
    assert json.loads(capsys.readouterr().out)["train_images"] == 32
    assert run(classifier.main, *flags, "--output", tmp_path / "parts.pt" / "c.pt") == 2
    assert "parts.pt is a file" in capsys.readouterr().err
    assert len(steps) == 3 * 4, "an output that can't be written is found before work starts"
    assert run(classifier.main, *flags, "--output", tmp_path / "parts.pt", "--lr", 0.1) == 2
    assert "parts.pt is of a classifier trained with lr 0.002, not 0.1" in capsys.readouterr().err


def test_file_restores_the_network(tmp_path: Path, network: Classifier) -> None:
    """Batch-norm statistics and the input size must survive the file."""
    save_classifier(network, ("a", "b", "c"), tmp_path / "c.pt")
    loaded, classes = load_classifier(tmp_path / "c.pt")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(loaded(images), network(images))
    assert classes == ("a", "b", "c")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_features_give_the_logits_of_the_plain_forward(network: Classifier) -> None:
    """Features taken at another place than before the last layer would score something else."""
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features, logits = network.features_and_logits(images)
    torch.testing.assert_close(logits, network(images))
    assert features.shape == (2, network.feature_dim)


def test_extracting_draws_no_random_numbers(tmp_path: Path, network: Classifier) -> None:
    """Loading during training must leave the training's random numbers as they were."""
    save_classifier(network, ("a", "b", "c"), tmp_path / "c.pt")
    before = torch.get_rng_state()
    load_classifier(tmp_path / "c.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_moves_pixels_as_told() -> None:
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(images, STILL, generator), images)
    flipped = augment(images, replace(STILL, flip=True), generator)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert bool((mirrored ^ kept).all())
    assert 10 < int(mirrored.sum()) < 54
    assert not torch.equal(augment(images, ClassifierTrainConfig(), generator), images)


@pytest.mark.parametrize(
    "setting", [{"epochs": 0}, {"lr": 0.0}, {"batch_size": 0}, {"rotate": -1.0}, {"shift": 1.0}, {"weight_decay": -1.0}]
)
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"--{name} is {value}"):
        ClassifierTrainConfig(**setting)


def test_unknown_architectures_and_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="no_such_net"):
        Classifier(ClassifierConfig("no_such_net", 2, 16, 16))
    with pytest.raises(UserError, match="input_size is 0"):
        ClassifierConfig("test_resnet", 2, 16, 0)


def test_other_files_are_refused(tmp_path: Path, network: Classifier) -> None:
    """A truncated file, another checkpoint, and a pickle that would run code."""
    save_classifier(network, ("a", "b", "c"), tmp_path / "c.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:5000])
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save({"config": Path("code")}, tmp_path / "objects.pt")
    (tmp_path / "text.pt").write_text("no classifier")
    for name in ("cut", "other", "objects", "text"):
        with pytest.raises(UserError, match=rf"{name}\.pt "):
            load_classifier(tmp_path / f"{name}.pt")


def test_test_images_of_other_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stripes(tmp_path / "train", 1, seed=0)
    write_stripes(tmp_path / "test", 1, seed=0, classes=("down", "up"))
    flags = f"--data_path {tmp_path}/train --test_path {tmp_path}/test --output {tmp_path}/c.pt --img_size 16"
    monkeypatch.setattr(sys, "argv", ["classifier", *flags.split()])
    with pytest.raises(UserError, match="down, up"):
        classifier.main()
