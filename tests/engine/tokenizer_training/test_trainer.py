"""Training small tokenizers: it learns, the codebook stays alive, files are complete, mistakes are named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine.tokenizer_training import data, trainer
from engine.tokenizer_training.codebook import DeadCodeRevival, codebook_use, kmeans_start
from engine.tokenizer_training.quality import evaluate
from engine.tokenizer_training.trainer import TokenizerTrainConfig, train_tokenizer
from tests.helpers.commands import run
from tests.helpers.pictures import assert_shows, assert_text
from tokenizers import VQConfig, load_tokenizer
from tokenizers.train import main
from tokenizers.vq_model import Codebook, VQModel
from util.errors import UserError
from util.pictures import to_float, to_uint8

MODEL = VQConfig(base_width=8, multipliers=(1, 2), res_blocks=1, z_channels=16, codebook_size=32, code_dim=4)
CPU = torch.device("cpu")


class Blobs:
    """48 pictures, 8×8: a square on a background, both black, grey or white."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.zeros(48, 8, 8, 3, dtype=torch.uint8)
        for image in self.images:
            background, square = torch.randperm(3, generator=generator).tolist()[:2]
            row, column = torch.randint(0, 5, (2,), generator=generator).tolist()
            image[:] = 127 * background
            image[row : row + 4, column : column + 4] = 127 * square

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], 0


def _clusters(number: int, per_cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors close to ``number`` orthogonal centres."""
    centres = torch.eye(number)
    return centres, F.normalize(
        centres.repeat(per_cluster, 1) + 0.01 * torch.randn(number * per_cluster, number), dim=1
    )


def test_training_improves_reconstructions_and_uses_the_codebook(tmp_path: Path) -> None:
    """Guards against a gradient that does not pass the quantiser and against a collapsing codebook."""
    config = TokenizerTrainConfig(60, batch_size=16, lr=4e-3, eval_freq=10, held_out=0.3)
    metrics = train_tokenizer(Blobs(), MODEL, config, tmp_path, CPU)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 61, 10))
    assert metrics["psnr_db"] > lines[0]["psnr_db"] + 3
    assert metrics["codebook_share"] > 0.6
    assert metrics["codebook_perplexity"] > 8
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved.items() >= metrics.items()
    assert saved["training"]["lr"] == 4e-3
    assert (metrics["train_images"], metrics["held_out_images"]) == (34, 14)
    model = load_tokenizer(tmp_path / "tokenizer.pt")
    assert model.config == MODEL
    _, held_out_set = data.split(Blobs(), config.held_out, config.seed)
    held_out = torch.stack([held_out_set[i][0] for i in range(14)])
    assert evaluate(model, held_out, 2)["psnr_db"] == pytest.approx(metrics["psnr_db"], abs=2e-3)
    shown = held_out[:12]
    with torch.no_grad():
        decoded = to_uint8(model.decode(model.encode(to_float(shown))))
    cells = assert_shows(tmp_path / "reconstructions.png", torch.cat([shown, decoded]), columns=12)
    for top in cells.top:
        assert_text(cells.pixels[top : top + cells.height, : cells.left[0]])


def test_the_seed_decides_the_result(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_tokenizer(Blobs(), MODEL, TokenizerTrainConfig(3, batch_size=8, seed=seed), tmp_path / name, CPU)
    a, b, c = (load_tokenizer(tmp_path / name / "tokenizer.pt").state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.conv_in.weight"], c["encoder.conv_in.weight"])


def test_psnr_is_that_of_the_definition() -> None:
    model = VQModel(MODEL).eval()
    pixels = torch.stack([image for image, _ in (Blobs()[i] for i in range(3))])
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1)).clamp(-1, 1)
    error = ((decoded + 1) * 127.5 - pixels.permute(0, 3, 1, 2)).double().square().mean((1, 2, 3))
    expected = (10 * torch.log10(255**2 / error)).mean().item()
    assert evaluate(model, pixels, 2)["psnr_db"] == pytest.approx(expected, abs=1e-3)


def test_a_large_data_set_is_streamed_in_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the two ways of reading showing the network different images."""
    train_set, _ = data.split(Blobs(), held_out=0.1, seed=0)

    def batches(first_step: int) -> list[torch.Tensor]:
        return list(data.read_batches(train_set, range(first_step, 7), 10, 3, 0, CPU))

    in_memory, later = batches(0), batches(5)
    monkeypatch.setattr(data, "_IN_MEMORY_BYTES", 0)
    assert len(in_memory) == 7
    for a, b in ((in_memory, batches(0)), (in_memory[5:], later), (later, batches(5))):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    every = torch.stack([train_set[i][0] for i in range(43)])
    assert torch.equal(torch.cat(in_memory)[:43].unique(dim=0), every.unique(dim=0))


def test_flip_mirrors_left_and_right_only() -> None:
    plain = Blobs().images
    flipped = data.flip_half(plain)
    mirrored = [torch.equal(a, b.flip(1)) and not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)


def test_an_interrupted_training_leaves_the_last_saved_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a half-written tokenizer, or figures that belong to another one."""
    real = trainer.forward
    calls = iter(range(100))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(Blobs(), MODEL, TokenizerTrainConfig(100, batch_size=4, eval_freq=4), tmp_path, CPU)
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 4
    assert load_tokenizer(tmp_path / "tokenizer.pt").config == MODEL
    assert {file.name for file in tmp_path.iterdir()} == {
        "tokenizer.pt",
        "metrics.json",
        "metrics.jsonl",
        "reconstructions.png",
        "state.pth",
    }


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against other batches, flips, learning rates, dead codes or moments after a kill."""
    monkeypatch.setattr(trainer, "_PLAIN", 0.25)
    monkeypatch.setattr(trainer, "_REVIVE_UNTIL", 1)
    config = TokenizerTrainConfig(24, batch_size=8, eval_freq=4, flip=True, lr=4e-3)
    train_tokenizer(Blobs(), MODEL, config, tmp_path / "whole", CPU)
    assert not (tmp_path / "whole" / "state.pth").exists()
    real = trainer.forward
    for killed_at in (5, 18):  # before the codebook starts, and before entries are revived
        steps = iter(range(1000))

        def killed(*args: Any, steps: Iterator[int] = steps, killed_at: int = killed_at, **kwargs: Any) -> Any:
            if next(steps) == killed_at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        folder = tmp_path / f"killed{killed_at}"
        monkeypatch.setattr(trainer, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(Blobs(), MODEL, config, folder, CPU)
        shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
        train_tokenizer(Blobs(), MODEL, config, folder, CPU)
        assert next(steps) == killed_at + 1 + 24 - killed_at // 4 * 4  # only what was lost is done again
        whole, resumed = (load_tokenizer(path / "tokenizer.pt").state_dict() for path in (tmp_path / "whole", folder))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (tmp_path / "whole", folder)]
        curves = [[{**json.loads(line), "elapsed_sec": 0} for line in run] for run in lines]
        assert curves[0] == curves[1]

    # Neither an unfinished training nor a finished one, on which caches depend, is replaced by one of other settings.
    other = dataclasses.replace(config, seed=1)
    for folder in (tmp_path / "other", tmp_path / "whole"):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match="trained with seed 0, not 1"):
            train_tokenizer(Blobs(), MODEL, other, folder, CPU)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # A record of an earlier version may lack a name.
    saved = json.loads(before["metrics.json"])
    del saved["tokenizer"]["img_size"]
    (tmp_path / "whole" / "metrics.json").write_text(json.dumps(saved))
    monkeypatch.setattr(trainer, "forward", None)  # nothing is left to do
    again = train_tokenizer(Blobs(), MODEL, dataclasses.replace(config, num_workers=1), tmp_path / "whole", CPU)
    assert again == {name: saved[name] for name in again}
    assert "psnr_db" in again


@pytest.mark.parametrize(
    ("told", "status", "step"), [(signal.SIGTERM, 75, 3), (signal.SIGUSR2, 75, 13), (signal.SIGINT, 130, 9)]
)
def test_a_stop_signal_saves_and_the_same_call_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: signal.Signals, status: int, step: int
) -> None:
    """Guards against steps since the last measurement being lost, and a time limit below them that never gets on."""
    monkeypatch.setattr(trainer, "_PLAIN", 0.25)
    config = TokenizerTrainConfig(16, batch_size=8, eval_freq=100, flip=True, lr=4e-3)
    train_tokenizer(Blobs(), MODEL, config, tmp_path / "whole", CPU)
    real = trainer.forward
    steps = iter(range(1000))

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == step - 1:
            os.kill(os.getpid(), told)
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "forward", signalled)
    with pytest.raises(SystemExit) as stop:
        train_tokenizer(Blobs(), MODEL, config, tmp_path / "run", CPU)
    assert stop.value.code == status
    train_tokenizer(Blobs(), MODEL, config, tmp_path / "run", CPU)
    assert next(steps) == 16  # none is done twice
    whole, resumed = (load_tokenizer(tmp_path / name / "tokenizer.pt").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    """Guards against a seed that is accepted and overflows with the first step."""
    train_tokenizer(Blobs(), MODEL, TokenizerTrainConfig(2, batch_size=8, seed=2**32 - 1), tmp_path, CPU)


def test_a_test_set_is_measured_and_not_trained_on(tmp_path: Path) -> None:
    class Grey(Blobs):
        def __init__(self) -> None:
            self.images = torch.full((5, 8, 8, 3), 90, dtype=torch.uint8)

    metrics = train_tokenizer(Blobs(), MODEL, TokenizerTrainConfig(2), tmp_path, CPU, test_set=Grey())
    assert (metrics["train_images"], metrics["held_out_images"]) == (48, 5)
    grey = evaluate(load_tokenizer(tmp_path / "tokenizer.pt"), Grey().images, 5)
    assert metrics["psnr_db"] == pytest.approx(grey["psnr_db"], abs=2e-3)


def test_kmeans_finds_separate_clusters() -> None:
    """Guards against a start in which two entries share a cluster and another has none."""
    centres, features = _clusters(8, 50)
    codebook = Codebook(32, 8)
    kmeans_start(codebook, features)
    assert (centres @ codebook.entries().T).amax(1).min() > 0.99
    assert torch.bincount(codebook.nearest(features), minlength=32).min() > 0


def test_kmeans_takes_fewer_features_than_entries() -> None:
    codebook = Codebook(32, 8)
    _, features = _clusters(8, 1)
    kmeans_start(codebook, features)
    assert torch.allclose((features @ codebook.entries().T).amax(1), torch.ones(8))


def test_dead_entries_move_to_badly_served_features_and_live_ones_stay() -> None:
    """Guards against collapse: all entries but one sit where no feature is."""
    centres, features = _clusters(8, 50)
    codebook = Codebook(8, 8)
    with torch.no_grad():
        codebook.embedding.weight.copy_(-torch.ones(8, 8))
        codebook.embedding.weight[2] = centres[0]
    optimizer = torch.optim.AdamW(codebook.parameters())
    codebook.lookup(torch.arange(8)).sum().backward()
    optimizer.step()
    codebook.embedding.weight.data[2] = centres[0]
    revival = DeadCodeRevival(codebook)
    revival.count(codebook.nearest(features))
    used = codebook_use(torch.bincount(codebook.nearest(features), minlength=8))[1]
    alive = torch.bincount(codebook.nearest(features), minlength=8) > 0
    assert torch.equal(revival.revive(features, optimizer), (~alive).nonzero().flatten())
    assert torch.equal(codebook.embedding.weight[2], centres[0])
    assert codebook_use(torch.bincount(codebook.nearest(features), minlength=8))[1] > 2 * used
    moments = optimizer.state[codebook.embedding.weight]["exp_avg_sq"]
    assert (moments[~alive] == 0).all()
    assert (moments[alive] > 0).any()


def test_revival_counts_from_zero_after_each_check() -> None:
    """Guards against counts of long ago keeping a dead entry."""
    codebook = Codebook(4, 4)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.eye(4))
    optimizer = torch.optim.AdamW(codebook.parameters())
    revival = DeadCodeRevival(codebook)
    features = F.normalize(torch.randn(100, 4), dim=1)
    revival.count(torch.arange(4).repeat(50))
    assert revival.revive(features, optimizer).tolist() == []
    revival.count(torch.tensor([0, 1, 2] * 50))
    assert revival.revive(features, optimizer).tolist() == [3]
    assert torch.equal(codebook.embedding.weight[:3], torch.eye(4)[:3])


def test_codebook_use_of_known_counts() -> None:
    assert codebook_use(torch.tensor([5, 5, 5, 5])) == pytest.approx((1.0, 4.0))
    assert codebook_use(torch.tensor([7, 0, 0, 0])) == pytest.approx((0.25, 1.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    base = "--base_width 8 --res_blocks 1 --z_channels 8 --codebook_size 8 --img_size 16 --device cpu --num_workers 0"
    monkeypatch.setattr("sys.argv", ["train", *base.split(), *map(str, arguments)])
    main()


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    import logging

    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.mark.parametrize(
    ("flags", "stride", "steps"),
    [
        (["--stride", 8, "--epochs", 2, "--batch_size", 2], 8, 5),
        (["--stride", 2, "--multipliers", 1, 1, "--steps", 2, "--bf16", "--flip"], 2, 2),
    ],
)
def test_the_command_trains_a_loadable_tokenizer(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[object],
    stride: int,
    steps: int,
) -> None:
    _run(monkeypatch, "--data_path", folder, "--output_dir", tmp_path / "out", *flags)
    assert load_tokenizer(tmp_path / "out" / "tokenizer.pt").stride == stride
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["step"] == steps
    assert "dB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", 0], "--steps is 0"),
        (["--epochs", 0], "--epochs is 0"),
        (["--steps", 1, "--batch_size", 0], "--batch_size is 0"),
        (["--steps", 1, "--lr", 0], "--lr is 0"),
        (["--steps", 1, "--held_out", 1], "--held_out is 1"),
        (["--steps", 1, "--eval_freq", 0], "--eval_freq is 0"),
        (["--steps", 1, "--num_workers", -1], "--num_workers is -1"),
        (["--steps", 1, "--seed", 2**32], "--seed is 4294967296"),
        (["--steps", 1, "--seed", -1], "--seed is -1"),
        (["--steps", 1, "--base_width", 6], "base_width 6"),
        (["--steps", 1, "--codebook_size", 0], "codebook_size 0"),
        (["--steps", 1, "--multipliers", 1, 2], "--multipliers"),
        (["--steps", 1, "--img_size", 24], "--img_size 24"),
        (["--steps", 1, "--device", "tpu"], "tpu"),
        (["--steps", 1, "--data_path", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_argument_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[object], message: str
) -> None:
    """Each must end with one sentence before anything is written."""
    with pytest.raises(UserError, match=message):
        _run(monkeypatch, "--data_path", folder, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--steps 3", "--steps 60 --eval_freq 100", "--steps 60 --bf16"])
def test_a_training_that_diverges_says_so_and_saves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    """Guards against NaN weights that caches are then made with, also where entries are revived first."""
    small = "--base_width 8 --res_blocks 1 --z_channels 8 --codebook_size 8 --img_size 16 --device cpu --num_workers 0"
    words = ["--data_path", folder, "--output_dir", tmp_path / "out", "--lr", "1e30", *small.split(), *flags.split()]
    assert run(main, *words) == 1
    assert "no longer finite at step" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl"}
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == ""


def test_a_divergence_keeps_what_was_saved_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.forward
    steps = iter(range(1000))

    def diverging(model: VQModel, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == 6:
            model.decoder.conv_out.weight.data.fill_(float("nan"))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "forward", diverging)
    with pytest.raises(FloatingPointError, match="at step 8"):
        train_tokenizer(Blobs(), MODEL, TokenizerTrainConfig(12, batch_size=8, eval_freq=4), tmp_path, CPU)
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 4
    saved = [
        load_tokenizer(tmp_path / "tokenizer.pt").state_dict(),
        trainer.load_checkpoint(tmp_path / "state.pth")["model"],
    ]
    assert all(weights.isfinite().all() for state in saved for weights in state.values())


def test_a_broken_image_is_named_and_skipped_only_on_request(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "class0" / "0.png").write_bytes(b"broken")
    arguments = ["--data_path", folder, "--output_dir", tmp_path / "out", "--steps", 1, "--num_workers", 2]
    with pytest.raises(UserError, match=r"0\.png"):
        _run(monkeypatch, *arguments)
    _run(monkeypatch, *arguments, "--skip_broken")
    assert (tmp_path / "out" / "tokenizer.pt").exists()


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    class One(Blobs):
        def __len__(self) -> int:
            return 1

    with pytest.raises(UserError, match=r"1 image\(s\)"):
        train_tokenizer(One(), MODEL, TokenizerTrainConfig(1), tmp_path, CPU)
