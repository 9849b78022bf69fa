"""The latency benchmark runs on a CPU, for every path there, and says what it counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.decoding import latency
from models import model_config
from scripts import benchmark_latency
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import VQModel, save_tokenizer
from util.errors import UserError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_latency", "--device", "cpu", *map(str, arguments)])
    benchmark_latency.main()


@pytest.mark.slow
def test_all_cases_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_latency, "copy_bytes", lambda device: 1e10)
    monkeypatch.setattr(benchmark_latency, "matrix_product_flops", lambda device, dtype: 1e11)
    tokenizer, output = tmp_path / "tokenizer.pt", tmp_path / "latency.json"
    save_tokenizer(tiny_tokenizer(16, 16384), tokenizer)
    model = ("--model", "lpd_debug", "--img_size", 64, "--generation_steps", 5, "--vqgan_path", tokenizer)
    runs = ("--runs", 2, "--batch_sizes", 1, 3, "--one_by_one", "--paths", "auto", "plain")
    run(monkeypatch, *model, *runs, "--profile", tmp_path, "--output", output)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(output.read_text())
    results = printed["results"]
    found = {(r["steps"], r["batch_size"], r["path"], r["pixels"]) for r in results}
    kinds = [(5, 1, True), (5, 1, False), (5, 3, True), (5, 3, False), (16, 1, False)]
    assert found == {(steps, B, path, pixels) for steps, B, pixels in kinds for path in ("plain", "packed")}
    assert len(results) == len(found)
    plain = {(r["steps"], r["batch_size"], r["pixels"]): r["median_ms"] for r in results if r["path"] == "plain"}
    for r in results:
        assert r["speed_up"] == pytest.approx(plain[r["steps"], r["batch_size"], r["pixels"]] / r["median_ms"])
        assert 0 < r["flops_share"] < 1
        assert r["not_measured"] is None
        assert (r["graph_nodes"], r["within_node_budget"]) == (None, None)
        assert 0 < r["p10_ms"] <= r["median_ms"] <= r["p90_ms"]
        assert r["images_per_sec"] == pytest.approx(1000 * r["batch_size"] / r["median_ms"])
        assert "published_a100" not in r
    assert len(list(tmp_path.glob("*.txt"))) == len(results)
    assert printed["draw"]["own_noise_sec"] > 0


def test_chosen_outputs_and_fewer_runs_of_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_latency, "copy_bytes", lambda device: 1e10)
    monkeypatch.setattr(benchmark_latency, "matrix_product_flops", lambda device, dtype: 1e11)
    model = ("--model", "lpd_debug", "--img_size", 32, "--generation_steps", 2, "--outputs", "codes")
    run(monkeypatch, *model, "--batch_sizes", 1, 2, "--paths", "plain", "--warmup", 2, "--runs", 3, "--batch_runs", 1)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(r["batch_size"], r["warmup"], r["runs"], r["pixels"]) for r in results] == [
        (1, 2, 3, False),
        (2, 1, 1, False),
    ]
    assert [r["host_us"] for r in results] == [None, None]


def test_time_of_the_host_ends_where_the_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a made-up GPU and clock: a call takes 10 ms of the host, and its work on the device 50 ms more."""
    now = [0.0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    class Call(SimpleNamespace):
        def __call__(self, labels: object, orders: object, seeds: object) -> None:
            passes(0.01)

    config = model_config("lpd_debug")
    decoder: Any = Call(device=torch.device("cuda"), batch_size=1, model=SimpleNamespace(config=config), labels=None)
    monkeypatch.setattr(latency, "synchronize", lambda device: passes(0.05))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    measured = latency.measure_latency(decoder, 1, 3)
    assert measured.host_s == pytest.approx(0.01)
    assert measured.median_s == pytest.approx(0.06)
    decoder.device = torch.device("cpu")
    assert latency.measure_latency(decoder, 0, 1).host_s is None


def test_a_share_above_1_is_not_measured_and_a_batch_of_8_is_a_cpu_s_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the limits were measured on a busy machine; without the plain path nothing is compared with it."""
    monkeypatch.setattr(benchmark_latency, "copy_bytes", lambda device: 1e12)
    monkeypatch.setattr(benchmark_latency, "matrix_product_flops", lambda device, dtype: 1e3)
    model = ("--model", "lpd_debug", "--img_size", 32, "--generation_steps", 2)
    monkeypatch.setattr(benchmark_latency, "random_tokenizer", lambda: tiny_tokenizer(16, 16384))
    run(monkeypatch, *model, "--runs", 1, "--warmup", 0, "--paths", "packed_int8")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["limits"]["flops_per_sec"] == {"float32": 1e3, "int8": 1e3}
    assert [r["batch_size"] for r in printed["results"]] == [1, 1, 8, 8]
    for r in printed["results"]:
        assert r["flops_per_sec"] > 1e3
        assert (r["flops_share"], r["speed_up"]) == (None, None)
        assert r["not_measured"].startswith("a share above 1")
        assert 0 < r["weight_bytes_share"] < 1


def test_the_graph_of_one_case_has_a_budget() -> None:
    rows = benchmark_latency.LatencyBenchmark(rows=("lpd_l_res256_steps20", "lpd_l_res256_steps32")).chosen_rows()
    case = (1, "graph", False)
    assert [row.node_budget(*case) for row in rows] == [2600, None]
    others = [(64, "graph", False), (1, "graph_library", False), (1, "graph", True)]
    assert [rows[0].node_budget(*other) for other in others] == [None, None, None]


@pytest.mark.parametrize(("img_size", "gigaflops"), [(256, 253), (512, 1017)])
def test_flops_of_the_published_tokenizer(img_size: int, gigaflops: float) -> None:
    with torch.device("meta"):
        tokenizer = VQModel()
    flops = benchmark_latency.vq_decode_flops(tokenizer, model_config("lpd_l", img_size=img_size))
    assert flops / 1e9 == pytest.approx(gigaflops, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rows", "lpd_m"], "--rows is 'lpd_m'"),
        (["--threads", 0], "threads is 0"),
        (["--runs", 0], "--runs is 0"),
        (["--paths", "graph"], "graph needs a CUDA GPU"),
    ],
)
def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch, arguments: list[object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(monkeypatch, *arguments)
