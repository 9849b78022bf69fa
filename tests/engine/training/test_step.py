"""The training step: parts, processes, sharding and compilation change nothing but speed and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention

import engine.training.step
import main_lpd
import models.mask
from engine.training.batch import Part
from engine.training.config import TrainConfig
from engine.training.step import TrainStep, choose_attention
from models import build_model, model_config
from models.lpd import LPD
from orders import published_group_sizes
from tests.helpers.commands import run as run_command
from tests.helpers.compilation import captured_graphs
from tests.helpers.pictures import pixels_of
from tests.helpers.processes import ALONE, in_processes
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.tiny_run import CLASSES, L, V
from tests.helpers.training_case import SCHEDULES, build, config, make_cache, train
from tokenizers import save_tokenizer
from util.checkpoint import LAST, load_checkpoint, save_checkpoint
from util.data.codes import MappedCodes
from util.dist import Dist
from util.errors import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("train_step") / "codes")


def short(folder: Path, **changes: object) -> TrainConfig:
    """Two epochs of five steps; a clip that acts, so that a wrong norm shows."""
    return config(folder, **{"epochs": 2, "grad_clip": 0.3, "ema": 0.9, **changes})


def run(
    cache: Path,
    settings: TrainConfig,
    dist: Dist = ALONE,
    resume: Path | None = None,
    evaluate: Callable[[LPD, int], None] | None = None,
    **overrides: Any,
) -> None:
    """Train the float64 debug model without dropout, from the start or from a checkpoint."""
    model = build(dropout=0.0)
    if overrides:
        torch.manual_seed(0)
        shape = {"img_size": 64, "class_num": CLASSES, "vocab_size": V}
        model = build_model("lpd_debug", **shape, **overrides).double()
    checkpoint = None if resume is None else load_checkpoint(resume / LAST)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
    train(model, MappedCodes(cache), SCHEDULES, settings, dist, resume=checkpoint, evaluate=evaluate)


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, one part."""
    folder = tmp_path_factory.mktemp("whole")
    run(cache, short(folder))
    return folder


def assert_same_run(folder: Path, expected: Path) -> None:
    """Weights, moving average and optimizer, in the same plain form."""
    first, second = load_checkpoint(expected / LAST), load_checkpoint(folder / LAST)
    for name in ("model", "model_ema", "optimizer"):
        torch.testing.assert_close(second[name], first[name], rtol=1e-8, atol=1e-8)
    assert {type(value) for value in second["model"].values()} == {torch.Tensor}


def test_parts_equal_one_batch(cache: Path, tmp_path: Path, whole: Path) -> None:
    """A factor lost between the parts, or draws that depend on the part, would show here."""
    run(cache, short(tmp_path, batch_size=2, grad_accum=4))
    assert_same_run(tmp_path, whole)


def test_resumed_in_other_parts_it_is_the_same_run(cache: Path, tmp_path: Path, whole: Path) -> None:
    run(cache, short(tmp_path, batch_size=4, grad_accum=2, max_steps=7))
    assert load_checkpoint(tmp_path / LAST)["step"] == 7
    run(cache, short(tmp_path), resume=tmp_path)
    assert_same_run(tmp_path, whole)


def four_processes(cache: Path, folder: Path, dist: Dist) -> None:
    run(cache, short(folder / "ddp", batch_size=2), dist)


def two_processes(cache: Path, folder: Path, dist: Dist) -> None:
    def evaluate(model: LPD, epoch: int) -> None:
        """Every process gets a whole model that can be called without the others."""
        torch.save(model.state_dict(), folder / f"evaluated-{dist.rank}.pt")
        if dist.is_main:
            model(torch.zeros(1, L, dtype=torch.int64), None, torch.arange(L)[None], SCHEDULES[0])

    run(cache, short(folder / "ddp_parts", batch_size=2, grad_accum=2), dist)
    parts = short(folder / "fsdp_parts", batch_size=2, grad_accum=2, fsdp=True)
    run(cache, parts, dist, evaluate=evaluate, grad_checkpointing=True)
    run(cache, short(folder / "to_fsdp", batch_size=4, fsdp=True), dist, resume=folder / "to_fsdp")
    run(cache, short(folder / "from_fsdp", batch_size=4, fsdp=True, max_steps=7), dist)


@pytest.mark.slow
def test_four_processes_equal_one(cache: Path, tmp_path: Path, whole: Path) -> None:
    in_processes(4, partial(four_processes, cache, tmp_path))
    assert_same_run(tmp_path / "ddp", whole)


@pytest.mark.slow
def test_two_processes_sharded_or_not_equal_one(cache: Path, tmp_path: Path, whole: Path) -> None:
    """Also with activation checkpointing, and where a run is resumed with sharding or without it."""
    run(cache, short(tmp_path / "to_fsdp", max_steps=3))
    in_processes(2, partial(two_processes, cache, tmp_path))
    assert load_checkpoint(tmp_path / "from_fsdp" / LAST)["step"] == 7
    run(cache, short(tmp_path / "from_fsdp"), resume=tmp_path / "from_fsdp")
    for name in ("ddp_parts", "fsdp_parts", "to_fsdp", "from_fsdp"):
        assert_same_run(tmp_path / name, whole)
    average = load_checkpoint(whole / LAST)["model_ema"]
    for rank in range(2):
        evaluated = torch.load(tmp_path / f"evaluated-{rank}.pt", weights_only=True)
        torch.testing.assert_close(dict(evaluated), average, rtol=1e-8, atol=1e-8)


def parts(model: LPD, seed: int, count: int = 1, batch: int = 4) -> Iterator[Part]:
    config, generator = model.config, torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(config.vocab_size, (batch, config.num_tokens), generator=generator)
        orders = torch.rand(tokens.shape, generator=generator).argsort(dim=1)
        labels = torch.randint(config.class_num, (batch,), generator=generator)
        part = tokens, labels, orders, torch.rand(batch, generator=generator) < 0.3
        yield tuple(x.to(model.pos_embed.device) for x in part)  # type: ignore[misc]


def test_moving_average_is_the_sum_it_should_be_and_is_what_evaluation_sees() -> None:
    """And it starts from the first weights, not from zero; training continues with the weights themselves."""
    model = build()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    step = TrainStep(model, TrainConfig(ema=0.75), ALONE)
    for seed in range(3):
        step(parts(model, seed), SCHEDULES[0], lr=1e-2)
        for name, value in model.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * value
    averaged = step.evaluation_model().state_dict()
    torch.testing.assert_close(dict(averaged), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(averaged["head.weight"], model.head.weight)
    torch.testing.assert_close(step.state()["model_ema"], expected, rtol=1e-12, atol=1e-12)
    assert TrainStep(model, TrainConfig(), ALONE).evaluation_model() is model


def test_moving_average_turned_on_or_off_later(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    averaged, plain = TrainStep(model, TrainConfig(ema=0.5), ALONE), TrainStep(model, TrainConfig(), ALONE)
    averaged.load(plain.state())
    assert "starts now" in caplog.text
    plain.load(averaged.state())
    assert "ends here" in caplog.text


def test_average_of_narrow_weights_is_float32() -> None:
    """In bfloat16 a decay of 0.9999 would round every change away."""
    step = TrainStep(build().bfloat16(), TrainConfig(ema=0.9999), ALONE)
    assert {value.dtype for value in step.state()["model_ema"].values()} == {torch.float32}


def test_evaluation_of_the_average_is_that_of_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--use_ema by the command: another result than the last weights, and a clear error where there is no average."""
    torch.manual_seed(0)
    save_tokenizer(tiny_tokenizer(2, V), tmp_path / "tokenizer.pt")
    weights, average = (
        build_model("lpd_debug", img_size=8, stride=2, class_num=CLASSES, vocab_size=V) for _ in range(2)
    )
    torch.nn.init.normal_(average.head.weight)
    common = {"config": dataclasses.asdict(weights.config), "classes": ["a", "b", "c"]}
    first = {"model": weights.state_dict(), "model_ema": average.state_dict()}
    save_checkpoint(tmp_path / "both.pth", common | first)
    save_checkpoint(tmp_path / "average.pth", common | {"model": average.state_dict()})

    def grid(name: str, *flags: str) -> np.ndarray:
        output = tmp_path / "-".join((name, *flags))
        arguments = {
            "pretrained_ckpt": tmp_path / f"{name}.pth", "vqgan_path": tmp_path / "tokenizer.pt", "num_images": 3,
            "generation_steps": 4, "feature_extractor": "none", "device": "cpu", "output_dir": output,
        }  # fmt: skip
        words = (str(word) for key, value in arguments.items() for word in (f"--{key}", value))
        assert run_command(main_lpd.main, "--evaluate", *words, *flags) == expected_status
        return pixels_of(output / "grid.png") if expected_status == 0 else np.empty(0)

    expected_status = 0
    of_average = grid("average")
    assert np.array_equal(grid("both", "--use_ema"), of_average)
    assert not np.array_equal(grid("both"), of_average)
    expected_status = 2
    grid("average", "--use_ema")
    assert "average.pth holds no moving average of the weights" in capsys.readouterr().err.splitlines()[-1]


def test_compiled_step_equals_the_plain_one() -> None:
    """One graph for all blocks but the last and every schedule; afterwards the model is as it was."""
    results = []
    for compiled in (False, True):
        model = build(dropout=0.0)
        names = list(model.state_dict())
        with captured_graphs("aot_eager") as graphs:
            step = TrainStep(model, TrainConfig(compile=compiled), ALONE)
            losses = [step(parts(model, seed), group_sizes, 1e-2) for seed, group_sizes in enumerate(SCHEDULES)]
            assert graphs() == (3 if compiled else 0)  # blocks, last block, loss
        results.append((losses, model.state_dict()))
        assert list(model.state_dict()) == names
        assert all("forward" not in vars(block) for block in model.blocks)
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_few_whole_graphs_serve_all_published_schedules(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """With FlexAttention: blocks, last block, loss. Another schedule's mask must be data to them, not a reason."""
    model = build_model("lpd_debug", depth=3, class_num=CLASSES, vocab_size=V)
    counts = []
    with captured_graphs("aot_eager") as graphs:
        as_on_a_gpu(monkeypatch)
        step = TrainStep(model, TrainConfig(compile=True, attention="flex", bf16=bf16), ALONE)
        for seed, group_sizes in enumerate(published_group_sizes(256, 16)):
            step(parts(model, seed, batch=1), group_sizes, 1e-4)
            counts.append(graphs())
    assert counts == [3] * len(counts)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention is compiled in training; on a CPU torch refuses its backward pass, which its plain code has."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(engine.training.step, "why_no_flex", lambda *settings: None)
    monkeypatch.setattr(models.mask, "flex_attention", models.mask._fused_flex_attention())


def compiled_processes(folder: Path, dist: Dist) -> None:
    with pytest.MonkeyPatch.context() as patch, captured_graphs("aot_eager"):
        as_on_a_gpu(patch)
        for name, fsdp, checkpointing in (("ddp", False, True), ("fsdp", True, False), ("fsdp_ckpt", True, True)):
            torch.manual_seed(0)
            shape = {"img_size": 64, "class_num": CLASSES, "vocab_size": V, "grad_checkpointing": checkpointing}
            model = build_model("lpd_debug", **shape).double()
            step = TrainStep(model, TrainConfig(compile=True, fsdp=fsdp, attention="flex", grad_accum=2), dist)
            for seed in range(2):
                halves = (tuple(x.chunk(2)[dist.rank] for x in part) for part in parts(model, seed, count=2))
                step(halves, SCHEDULES[seed], 1e-3)  # type: ignore[arg-type]
            if state := step.state():
                torch.save(state["model"], folder / f"{name}-{dist.rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_compiled_blocks_with_flex_attention_under_ddp_and_fsdp(tmp_path: Path) -> None:
    """FSDP's and checkpointing's hooks must stay outside of the graph, and weights that FSDP frees must not be read."""
    torch.manual_seed(0)
    model = build_model("lpd_debug", img_size=64, class_num=CLASSES, vocab_size=V).double()
    step = TrainStep(model, TrainConfig(grad_accum=2), ALONE)
    for seed in range(2):
        step(parts(model, seed, count=2), SCHEDULES[seed], 1e-3)
    in_processes(2, partial(compiled_processes, tmp_path))
    for name in ("ddp-0", "ddp-1", "fsdp-0", "fsdp_ckpt-0"):
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-8, atol=1e-8)
    assert not (tmp_path / "fsdp-1.pt").exists()


def test_attention_that_cannot_be_had_is_refused_and_auto_avoids_it() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    released, debug = model_config("lpd_l"), model_config("lpd_debug", img_size=64)
    assert choose_attention("auto", released, cuda) == "flex"
    assert choose_attention("sdpa", released, cuda) == "sdpa"
    for refused, device, named in (
        (released, cpu, "on a CPU"),
        (model_config("lpd_l", attn_dropout=0.1), cuda, "--attn_dropout is 0.1"),
        (debug, cuda, "16 tokens"),
        (model_config("lpd_debug", num_heads=4), cuda, "the model's have 8"),
    ):
        assert choose_attention("auto", refused, device) == "sdpa"
        with pytest.raises(UserError, match=named):
            choose_attention("flex", refused, device)


def test_sharding_over_one_process_is_refused() -> None:
    with pytest.raises(UserError, match="torchrun"):
        TrainStep(build(), TrainConfig(fsdp=True), ALONE)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"grad_accum": 0}, "--grad_accum is 0"),
        ({"ema": 1.0}, "--ema is 1.0"),
        ({"ema": -0.1}, "--ema is -0.1"),
        ({"attention": "flash"}, "flash"),
    ],
)
def test_bad_settings_are_named(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        config(Path("x"), **changes)


def test_global_batch_and_learning_rate_count_all_parts() -> None:
    settings = TrainConfig(output_dir=Path("x"), batch_size=16, grad_accum=4)
    assert settings.global_batch(world_size=32) == 2048
    assert settings.peak_lr(world_size=32) == pytest.approx(8e-4)


@pytest.mark.gpu
def test_fast_step_on_a_gpu_equals_the_plain_one_and_never_waits() -> None:
    """FlexAttention, compiled, bf16: the losses of the plain step; and nothing is read back from the device."""
    dist, losses = Dist(0, 1, torch.device("cuda")), []
    for attention, compiled in (("sdpa", False), ("flex", True)):
        torch.manual_seed(0)
        model = build_model("lpd_debug", class_num=CLASSES, vocab_size=V).cuda()
        step = TrainStep(model, TrainConfig(bf16=True, ema=0.9, attention=attention, compile=compiled), dist)
        batches = [list(parts(model, seed)) for seed in range(4)]
        schedules = published_group_sizes(256, 16)
        found = [step(batch, schedules[0], 1e-3)[0] for batch in batches[:2]]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found += [step(batch, schedules[0], 1e-3)[0] for batch in batches[2:]]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
