"""The command that computes the statistics of an image folder and scores folders."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import metrics
from tests.helpers.evaluation_case import toy_extractor
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import save_tokenizer
from util.data.images import write_image_archive
from util.errors import UserError
from util.files import sha256

NUM_IMAGES = 11  # an odd last batch; ten splits of the Inception Score need ten images


def test_command_makes_statistics_and_scores_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder scored against its own statistics is at distance 0; the file says what it was made of."""
    pictures = tmp_path / "pictures"
    (pictures / "some" / "folders").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 20, 24, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(pictures / ("" if i % 2 else "some/folders") / f"{i}.png")
    (pictures / ".hidden.png").write_bytes(b"no picture")
    toy = toy_extractor()
    monkeypatch.setattr(metrics, "load_feature_extractor", lambda *_: toy)

    def command(flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["metrics", *f"--data_path {pictures} --device cpu {flags}".split()])
        metrics.main()

    command(f"--img_size 16 --output {tmp_path}/ref.npz --batch_size 3")
    reference = metrics.load_reference_statistics(tmp_path / "ref.npz")
    assert reference.metadata["num_images"] == NUM_IMAGES
    assert reference.metadata["extractor_sha256"] == toy.weights_hash
    capsys.readouterr()
    command(f"--img_size 16 --reference_statistics {tmp_path}/ref.npz --batch_size 100")
    printed = json.loads(capsys.readouterr().out)
    assert printed["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert printed["conventions"].keys() == {"inception_score"}
    assert printed["reference_sha256"] == sha256(tmp_path / "ref.npz")

    for flags, message in (
        (f"--img_size 9 --reference_statistics {tmp_path}/ref.npz", "16 px"),
        ("--img_size 16", "nothing to do"),
        (f"--img_size 0 --output {tmp_path}/x.npz", "--img_size is 0"),
        (f"--img_size 16 --output {tmp_path}/x.npz --batch_size 0", "--batch_size is 0"),
        (f"--img_size 16 --output {tmp_path}/x.npz --data_path {tmp_path}/nothing", "nothing can't be read"),
    ):
        with pytest.raises(UserError, match=message):
            command(flags)
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:90])
    with pytest.raises(UserError, match=r"3\.png"):
        command(f"--img_size 16 --output {tmp_path}/x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_image_archives_are_scored_with_their_classes_and_through_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against an accuracy against shifted labels, and a tokenizer's floor measured on the photos themselves."""
    toy = toy_extractor()
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 16, 16, 3), dtype=np.uint8)
    read_as = toy(torch.from_numpy(pixels).permute(0, 3, 1, 2))[1].argmax(1)
    labels = np.where(np.arange(NUM_IMAGES) < 4, (read_as.numpy() + 1) % 5, read_as.numpy())
    files = []
    for image in pixels:
        files.append(io.BytesIO())
        Image.fromarray(image).save(files[-1], "PNG")
    write_image_archive(tmp_path / "photos.npz", [file.getvalue() for file in files], labels, "abcde", [1] * NUM_IMAGES)
    tokenizer = tiny_tokenizer(2, 16)
    save_tokenizer(tokenizer, tmp_path / "vq.pt")
    monkeypatch.setattr(metrics, "load_feature_extractor", lambda *_: toy)

    def command(flags: str) -> dict:
        photos = f"--data_path {tmp_path}/photos.npz:test --img_size 16 --device cpu --batch_size 3"
        monkeypatch.setattr(sys, "argv", ["metrics", *photos.split(), *flags.split()])
        metrics.main()
        printed = capsys.readouterr().out
        return json.loads(printed) if printed else {}

    command(f"--output {tmp_path}/ref.npz")
    plain = command(f"--reference_statistics {tmp_path}/ref.npz")
    assert plain["class_accuracy"] == pytest.approx(7 / 11)
    assert plain["frechet_distance"] == pytest.approx(0, abs=1e-6)
    floor = command(f"--reference_statistics {tmp_path}/ref.npz --vqgan_path {tmp_path}/vq.pt")
    assert floor["tokenizer_sha256"] == sha256(tmp_path / "vq.pt")
    decoded = metrics.reconstruct(tokenizer, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    statistics = metrics.FeatureStatistics(toy.feature_dim)
    statistics.update(toy(decoded)[0])
    reference = metrics.load_reference_statistics(tmp_path / "ref.npz")
    expected = metrics.score(statistics, toy(decoded)[1], reference, "toy")["frechet_distance"]
    assert floor["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01
