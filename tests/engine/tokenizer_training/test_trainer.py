"""Training tokenizers: it learns, nothing is lost by a stop, it can be extended and fine-tuned, files are complete."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.tokenizer_training import data, folder, trainer
from engine.tokenizer_training.adversarial import Adversary
from engine.tokenizer_training.codebook import DeadCodeRevival
from engine.tokenizer_training.config import TokenizerTrainConfig
from engine.tokenizer_training.quality import evaluate
from engine.tokenizer_training.trainer import train_tokenizer
from tests.helpers.commands import ROOT
from tests.helpers.pictures import assert_shows, assert_text
from tests.helpers.tokenizer_case import CPU, FULL, LARGE, MODEL, Blobs, assert_same, outcome, train_full
from tokenizers import VQConfig, load_tokenizer
from tokenizers.vq_model import VQModel
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.pictures import to_float, to_uint8

PLAIN = TokenizerTrainConfig(24, batch_size=8, eval_freq=4, flip=True, lr=4e-3, ema=0)


@pytest.fixture(scope="module", autouse=True)
def _longer_plain_phase() -> Iterator[None]:
    """So that so few steps have one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_PLAIN", 0.25)
        yield


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], Iterator[int]]:
    """``at_step(n, act)`` does something before the n-th step from now, counted from 0, and returns the counter."""
    real = trainer.forward

    def install(number: int, act: Callable[[], None]) -> Iterator[int]:
        steps = iter(range(1000))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == number:
                act()
            return real(*args, **kwargs)

        monkeypatch.setattr(trainer, "forward", forward)
        return steps

    return install


def die() -> None:
    raise KeyboardInterrupt


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training with every loss."""
    path = tmp_path_factory.mktemp("whole")
    train_full(path)
    return path


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed in step 10, after the state of step 8."""
    path, real, steps = tmp_path_factory.mktemp("begun") / "run", trainer.forward, iter(range(100))

    def forward(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 9:
            die()
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            train_full(path)
    return path


def test_training_improves_reconstructions_and_uses_the_codebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a gradient that does not pass the quantiser and against a collapsing codebook."""
    monkeypatch.setattr(trainer, "_PLAIN", 0.05)
    config = TokenizerTrainConfig(60, batch_size=16, lr=4e-3, eval_freq=10, held_out=0.3, ema=0)
    metrics = train_tokenizer(Blobs(), MODEL, config, tmp_path, CPU)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 61, 10))
    assert metrics["psnr_db"] > lines[0]["psnr_db"] + 3
    assert metrics["codebook_share"] > 0.6
    assert metrics["codebook_perplexity"] > 8
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved.items() >= metrics.items()
    assert saved["training"]["lr"] == 4e-3
    assert (metrics["train_images"], metrics["held_out_images"], metrics["held_out_tokens"]) == (34, 14, 14 * 16)
    model = load_tokenizer(tmp_path / "tokenizer.pt")
    assert model.config == MODEL
    _, held_out_set = data.split(Blobs(), config.held_out, config.seed)
    held_out = torch.stack([held_out_set[i][0] for i in range(14)])
    found = evaluate(model, held_out, 2)
    for name in ("psnr_db", "ssim"):
        assert found[name] == pytest.approx(metrics[name], abs=2e-3)
    shown = held_out[[0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13]]  # evenly over all
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


def test_too_few_or_too_small_images_are_refused(tmp_path: Path) -> None:
    class One(Blobs):
        def __len__(self) -> int:
            return 1

    with pytest.raises(UserError, match=r"1 image\(s\)"):
        train_tokenizer(One(), MODEL, TokenizerTrainConfig(1), tmp_path, CPU)
    for changes, message in (
        ({"adversarial_weight": 0.5}, "--adversarial_weight needs pictures of at least 24 pixels; these have 8"),
        ({"lpips_path": (tmp_path / "vgg.pth",)}, "--lpips_path needs pictures of at least 16 pixels; these have 8"),
    ):
        with pytest.raises(UserError, match=message):
            train_tokenizer(Blobs(), MODEL, TokenizerTrainConfig(1, **changes), tmp_path, CPU)
    assert not any(tmp_path.iterdir())


# What is saved


def test_the_average_of_the_weights_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the definition, from the codebook's start on; a moved entry's average moves with it."""
    seen: list[dict[str, torch.Tensor]] = []
    moved: list[int] = []
    real_forward, real_revive = trainer.forward, DeadCodeRevival.revive

    def forward(model: VQModel, images: Any, quantise: bool, *rest: Any) -> Any:
        if quantise:
            seen.append({name: p.detach().double() for name, p in model.named_parameters()})
        return real_forward(model, images, quantise, *rest)

    def revive(*args: Any) -> torch.Tensor:
        replaced = real_revive(*args)
        moved.extend(replaced.tolist())
        return replaced

    monkeypatch.setattr(trainer, "forward", forward)
    monkeypatch.setattr(DeadCodeRevival, "revive", revive)
    monkeypatch.setattr(trainer, "_REVIVE_UNTIL", 1)
    config = TokenizerTrainConfig(20, batch_size=2, lr=1e-2, eval_freq=100, ema=0.7)
    train_tokenizer(Blobs(), MODEL, config, tmp_path, CPU)
    assert len(seen) == 15  # after five plain steps
    last = load_checkpoint(tmp_path / "state.pth")["model"]
    average = seen[0]
    for number, weights in enumerate([*seen[1:], {name: last[name].double() for name in average}]):
        decay = min(0.7, (1 + number) / (10 + number))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    saved = load_tokenizer(tmp_path / "tokenizer.pt").state_dict()
    assert moved
    for name, expected in average.items():
        if name == "quantize.embedding.weight":
            expected[moved] = last[name][moved].double()
        torch.testing.assert_close(saved[name].double(), expected, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(saved["decoder.conv_out.weight"], last["decoder.conv_out.weight"])


def test_no_tokenizer_is_written_before_it_can_be_used(
    tmp_path: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against codes of a random codebook; what is there from then on is whole, and has figures of its own."""
    monkeypatch.setattr(trainer, "_PLAIN", 0.5)
    at_step(5, die)
    with pytest.raises(KeyboardInterrupt):
        train_full(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "state.pth"}
    at_step(5, die)
    with pytest.raises(KeyboardInterrupt):
        train_full(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 8
    names = {"tokenizer.pt", "metrics.json", "metrics.jsonl", "reconstructions.png", "state.pth"}
    assert {path.name for path in tmp_path.iterdir()} == names
    saved = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert saved["quality"] == {name: lines[-1][name] for name in ("psnr_db", "ssim")}


@pytest.mark.parametrize("flags", [{"adversarial_weight": 0.0}, {}])
def test_a_divergence_keeps_what_was_saved_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    """Of the tokenizer and of the discriminator: a state with one that has diverged can't be resumed."""
    if flags:
        real = trainer.forward
        steps = iter(range(1000))

        def diverging(model: VQModel, *args: Any, **kwargs: Any) -> Any:
            if next(steps) == 9:
                model.decoder.conv_out.weight.data.fill_(float("nan"))
            return real(model, *args, **kwargs)

        monkeypatch.setattr(trainer, "forward", diverging)
    else:
        real_step = Adversary.step

        def step(self: Adversary, *args: Any) -> torch.Tensor:
            loss = real_step(self, *args)
            if self.optimizer.state[next(self.network.parameters())]["step"] == 5:  # the twelfth of all
                next(self.network.parameters()).data.fill_(float("inf"))
            return loss

        monkeypatch.setattr(Adversary, "step", step)
    with pytest.raises(FloatingPointError, match="at step 12: the training has diverged"):
        train_full(tmp_path, dataclasses.replace(FULL, **flags))
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 8
    state = load_checkpoint(tmp_path / "state.pth")
    assert state["step"] == 8
    saved = [load_tokenizer(tmp_path / "tokenizer.pt").state_dict(), state["model"]]
    assert all(weights.isfinite().all() for state in saved for weights in state.values())


# Stopped and started again


@pytest.mark.parametrize("killed_at", [5, 18])  # before the codebook starts, and before entries are revived
def test_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: Any, killed_at: int
) -> None:
    """Guards against other batches, flips, learning rates, dead codes or moments after a kill."""
    monkeypatch.setattr(trainer, "_REVIVE_UNTIL", 1)
    train_tokenizer(Blobs(), MODEL, PLAIN, tmp_path / "whole", CPU)
    steps = at_step(killed_at, die)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(Blobs(), MODEL, PLAIN, tmp_path / "killed", CPU)
    train_tokenizer(Blobs(), MODEL, PLAIN, tmp_path / "killed", CPU)
    assert next(steps) == killed_at + 1 + 24 - killed_at // 4 * 4  # only what was lost is done again
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("told", "status", "step"), [(signal.SIGTERM, 75, 1), (signal.SIGUSR2, 75, 11), (signal.SIGINT, 130, 7)]
)
def test_a_stop_signal_saves_and_the_same_call_resumes_exactly(
    tmp_path: Path, at_step: Any, whole: Path, told: signal.Signals, status: int, step: int
) -> None:
    """Guards against steps since the last measurement being lost, and a time limit below them that never gets on."""
    steps = at_step(step - 1, lambda: tell(told))
    with pytest.raises(SystemExit) as stop:
        train_full(tmp_path)
    assert stop.value.code == status
    train_full(tmp_path)
    assert next(steps) == 14  # none is done twice
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    """kill -9 between steps, while measuring and in the middle of files, with every loss and averaged weights."""
    script = ROOT / "tests" / "helpers" / "killed_tokenizer_runs.py"
    command = [sys.executable, str(script), str(tmp_path / "runs"), "12"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["killed"] >= 12
    assert report["in_a_write"] > 0
    assert report["wrong"] == []


def _judge(model: VQModel, interrupted: Callable[[], bool]) -> dict[str, Any]:
    if interrupted():
        raise trainer.Interrupted
    with torch.no_grad():
        return {"class_accuracy_real": 1.0, "class_accuracy_reconstructed": float(model.decoder.conv_out.weight.mean())}


@pytest.mark.parametrize("where", ["first measurement", "last measurement", "judge"])
def test_a_stop_signal_while_measuring_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    train_full(tmp_path / "whole", judge=_judge)
    real, calls = trainer.evaluate, iter(range(100))
    signalled = {"first measurement": 0, "last measurement": 3}.get(where)

    def evaluate_told(*args: Any) -> Any:
        if next(calls) == signalled:
            tell()
        return real(*args)

    def judge_told(model: VQModel, interrupted: Callable[[], bool]) -> dict[str, Any]:
        tell()
        return _judge(model, interrupted)

    monkeypatch.setattr(trainer, "evaluate", evaluate_told)
    with pytest.raises(SystemExit) as stop:
        train_full(tmp_path / "run", judge=judge_told if where == "judge" else _judge)
    assert stop.value.code == 75
    monkeypatch.undo()
    train_full(tmp_path / "run", judge=_judge)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_kill_while_measuring_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """The state is saved before: without the figures a finished training is not taken for finished."""

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    for name in ("evaluate", "save_tokenizer", "save_png", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, killed)
            with pytest.raises(KeyboardInterrupt):
                train_full(tmp_path, dataclasses.replace(FULL, eval_freq=100))
        assert load_checkpoint(tmp_path / "state.pth")["step"] == 14
    assert not (tmp_path / "metrics.json").exists()
    train_full(tmp_path, dataclasses.replace(FULL, eval_freq=100))
    (weights, lines, _), (expected, all_lines, _) = outcome(tmp_path), outcome(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert lines == all_lines[-1:]


@pytest.mark.parametrize("what", ["state.pth", "tokenizer.pt", "metrics.json", "reconstructions.png", "metrics.jsonl"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, what: str) -> None:
    """Each file in turn can't be written at the second measurement: the error is the disk's, and the call goes on."""
    full = OSError(28, "No space left on device")
    writes = iter(range(100))

    def fail(write: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if name(*args) == what and next(writes) == 1:
                raise full
            return write(*args, **kwargs)

        return replaced

    for function, name in (
        ("save_torch", lambda path, content: path.name),
        ("save_tokenizer", lambda model, path, quality: path.name),
        ("write_json", lambda path, value: path.name),
        ("save_png", lambda image, path: path.name),
    ):
        monkeypatch.setattr(trainer, function, fail(getattr(trainer, function), name))
    monkeypatch.setattr(
        trainer.MetricsWriter, "write", fail(trainer.MetricsWriter.write, lambda writer: "metrics.jsonl")
    )
    with pytest.raises(OSError, match="No space left"):
        train_full(tmp_path)
    state = load_checkpoint(tmp_path / "state.pth")
    assert state["step"] == (4 if what == "state.pth" else 8)
    load_tokenizer(tmp_path / "tokenizer.pt")
    train_full(tmp_path)
    assert_same(whole, tmp_path)


def _odd(**changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        torch.save(state | changes, path)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("{}"),
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        _odd(step="3"),
        _odd(step=-1),
        _odd(optimizer={}),
        _odd(adversary={"model": {}}),
        _odd(model_ema=None),
        _odd(training=[]),
        lambda path: shutil.copy(path.with_name("tokenizer.pt"), path),
    ],
)
def test_a_damaged_state_starts_over_but_never_over_a_finished_tokenizer(
    tmp_path: Path,
    at_step: Any,
    caplog: pytest.LogCaptureFixture,
    whole: Path,
    begun: Path,
    spoil: Callable[[Path], None],
) -> None:
    for name, source in (("finished", whole), ("run", begun)):
        shutil.copytree(source, tmp_path / name)
        spoil(tmp_path / name / "state.pth")
    at_step(0, die)
    with pytest.raises(KeyboardInterrupt):
        train_full(tmp_path / "run")
    assert "training starts from the beginning" in caplog.text
    assert "state.pth" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    before = {path.name: path.read_bytes() for path in (tmp_path / "finished").iterdir()}
    with pytest.raises(UserError, match=r"tokenizer\.pt can't be trained further: .*state.*--vqgan_path"):
        train_full(tmp_path / "finished", dataclasses.replace(FULL, steps=20))
    assert train_full(tmp_path / "finished")["step"] == 14  # nothing is left to do
    assert {path.name: path.read_bytes() for path in (tmp_path / "finished").iterdir()} == before


def test_damaged_figures_are_made_again_from_the_state(tmp_path: Path, whole: Path, at_step: Any) -> None:
    for name, content in (("cut", '{"step": 14, '), ("odd", '{"step": "14"}'), ("list", "[1]")):
        shutil.copytree(whole, tmp_path / name)
        (tmp_path / name / "metrics.json").write_text(content)
        steps = at_step(-1, die)
        train_full(tmp_path / name)
        assert next(steps) == 0
        assert_same(whole, tmp_path / name)


def test_another_training_is_refused(tmp_path: Path, whole: Path, begun: Path, at_step: Any) -> None:
    """Neither an unfinished training nor a finished one, on which caches depend, is replaced by another one."""
    for name, source in (("finished", whole), ("begun", begun)):
        shutil.copytree(source, tmp_path / name)
    for name in ("finished", "begun"):
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for changes, message in (
            ({"seed": 1}, "trained with seed 0, not 1; delete it, or give another"),
            ({"steps": 12}, "trained with steps 14, not 12; give at least 14, or another"),
        ):
            with pytest.raises(UserError, match=message):
                train_full(tmp_path / name, dataclasses.replace(FULL, **changes))  # type: ignore[arg-type]
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before
    # A record of an earlier version may lack a name, and had no state when it was finished.
    saved = json.loads((tmp_path / "finished" / "metrics.json").read_text())
    del saved["tokenizer"]["img_size"]
    (tmp_path / "finished" / "metrics.json").write_text(json.dumps(saved))
    (tmp_path / "finished" / "state.pth").unlink()
    at_step(0, die)
    assert train_full(tmp_path / "finished", dataclasses.replace(FULL, num_workers=1, eval_freq=5)) == saved
    # A tokenizer of which nothing is known.
    for name in ("state.pth", "metrics.json"):
        (tmp_path / "begun" / name).unlink()
    with pytest.raises(UserError, match=r"holds a tokenizer\.pt and no readable record of its training"):
        train_full(tmp_path / "begun")


def test_without_its_state_a_training_starts_over(tmp_path: Path, begun: Path, whole: Path) -> None:
    shutil.copytree(begun, tmp_path / "run")
    (tmp_path / "run" / "state.pth").unlink()
    train_full(tmp_path / "run")
    assert_same(whole, tmp_path / "run")


# Extended and fine-tuned


def test_a_finished_training_is_extended(tmp_path: Path, whole: Path, at_step: Any) -> None:
    """The learning rate follows the longer schedule; the adversary, once begun, stays; a kill changes nothing."""
    longer = dataclasses.replace(FULL, steps=40, eval_freq=7)  # by itself it would begin at step 20
    for name in ("a", "b"):
        shutil.copytree(whole, tmp_path / name)
    train_full(tmp_path / "a", longer)
    _, lines, metrics = outcome(tmp_path / "a")
    assert lines[: len(outcome(whole)[1])] == outcome(whole)[1]
    assert [line["step"] for line in lines] == [4, 8, 12, 14, 21, 28, 35, 40]
    assert [line["step"] for line in lines if "adversarial" in line] == [8, 12, 14, 21, 28, 35, 40]
    assert metrics["step"] == metrics["training"]["steps"] == 40
    assert lines[4]["lr"] == pytest.approx(
        trainer.learning_rate(20.5, schedule="cosine", lr=4e-3, min_lr=0, warmup_epochs=2, epochs=40)
    )
    at_step(11, die)
    with pytest.raises(KeyboardInterrupt):
        train_full(tmp_path / "b", longer)
    # The shorter training is finished as it was; what is extended is not extended to less.
    with pytest.raises(UserError, match="steps 40, not 30"):
        train_full(tmp_path / "b", dataclasses.replace(longer, steps=30))
    train_full(tmp_path / "b", longer)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_fine_tuning_starts_from_the_weights_and_keeps_the_codebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """Entries that these pictures do not use may serve others; quantisation is on from the first step."""
    shutil.copy(whole / "tokenizer.pt", tmp_path / "start.pt")
    start = load_tokenizer(tmp_path / "start.pt").state_dict()
    seen: list[dict[str, torch.Tensor]] = []
    real = trainer.forward

    def forward(model: VQModel, images: Any, quantise: bool, *rest: Any) -> Any:
        assert quantise
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return real(model, images, quantise, *rest)

    def never(*args: Any) -> None:
        raise AssertionError("the codebook was replaced")

    monkeypatch.setattr(trainer, "_REVIVE_UNTIL", 1)
    monkeypatch.setattr(trainer, "forward", forward)
    monkeypatch.setattr(trainer, "kmeans_start", never)
    monkeypatch.setattr(DeadCodeRevival, "revive", never)
    config = dataclasses.replace(FULL, steps=21, vqgan_path=tmp_path / "start.pt")
    metrics = train_full(tmp_path / "run", config)
    assert all(torch.equal(seen[0][name], start[name]) for name in start)
    assert not torch.equal(seen[1]["encoder.conv_in.weight"], start["encoder.conv_in.weight"])
    assert metrics["training"]["vqgan_path"] == str(tmp_path / "start.pt")
    tuned = load_tokenizer(tmp_path / "run" / "tokenizer.pt").state_dict()
    assert not torch.equal(tuned["encoder.conv_in.weight"], start["encoder.conv_in.weight"])
    other = VQConfig(**{**vars(LARGE), "code_dim": 3})
    with pytest.raises(UserError, match=r"start\.pt has code_dim 4, not 3; leave out --code_dim"):
        train_tokenizer(Blobs(24), other, config, tmp_path / "other", CPU)
    assert not (tmp_path / "other").exists()


def test_a_perceptual_loss_is_part_of_the_reconstruction_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against weights that are read and not used."""
    monkeypatch.setattr(trainer, "load_lpips", lambda paths, device: lambda a, b: (a - b).square().mean((1, 2, 3)))
    for weight in (1.0, 3.0):
        config = dataclasses.replace(FULL, steps=1, lpips_path=(tmp_path / "vgg.pth",), lpips_weight=weight)
        train_full(tmp_path / str(weight), config)
        (line,) = outcome(tmp_path / str(weight))[1]
        assert line["lpips"] == pytest.approx(weight * line["l2"], rel=1e-4)


def test_a_judge_is_asked_at_the_end_and_of_a_finished_training(tmp_path: Path, whole: Path) -> None:
    """Its figures are in the tokenizer's file, unless that was finished: caches know it by its hash."""
    train_full(tmp_path / "new", judge=_judge)
    assert torch.load(tmp_path / "new" / "tokenizer.pt", weights_only=True)["quality"].keys() == {*trainer.QUALITY}
    shutil.copytree(whole, tmp_path / "old")
    before = (tmp_path / "old" / "tokenizer.pt").read_bytes()
    metrics = train_full(tmp_path / "old", judge=_judge)
    assert metrics["class_accuracy_real"] == 1
    assert json.loads((tmp_path / "old" / folder.METRICS).read_text()) == metrics
    assert (tmp_path / "old" / "tokenizer.pt").read_bytes() == before
