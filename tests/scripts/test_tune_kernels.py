"""The candidates of the kernels' tiles are those that can be launched; without a GPU nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from models import model_config
from models.decode_kernels import NARROWEST, StepKernels, Tile
from models.fused import MAX_ROWS
from scripts import tune_kernels
from scripts.benchmarking import Report
from scripts.tune_kernels import (
    INTO_STREAM,
    Case,
    TuneConfig,
    all_cases,
    candidates,
    chosen_tile,
    products,
)
from tests.helpers.commands import run

LARGE = ("lpd_l", "lpd_xl", "lpd_xxl")
SHARED_MEMORY = {"8.9": 99 * 1024, "9.0": 227 * 1024}  # bytes of a program, by compute capability


@pytest.mark.parametrize("model", LARGE)
@pytest.mark.parametrize("shared_memory", SHARED_MEMORY.values(), ids=SHARED_MEMORY)
def test_candidates_divide_the_product_and_fit(model: str, shared_memory: int) -> None:
    """A tile that does not divide computes outputs twice or not at all; one too small writes past the buffers."""
    config = model_config(model)
    kernels = StepKernels(MAX_ROWS, config.embed_dim, config.num_heads, 4 * config.embed_dim, torch.device("cpu"))
    for product, (inputs, outputs) in products(config).items():
        for rows in TuneConfig().rows:
            tiles = candidates(config, product, rows, shared_memory)
            narrowest = -(-rows // 64) * outputs // NARROWEST
            assert len(tiles) >= (4 if shared_memory == SHARED_MEMORY["9.0"] else 1)
            assert any(tile.columns == NARROWEST for tile in tiles) == (narrowest <= 300)
            for tile in [*tiles, chosen_tile(config, product, rows, shared_memory)]:
                assert outputs % tile.columns == inputs % (tile.split * tile.block) == 0
                assert tile.stages * tile.block * (tile.columns + 64) * 2 <= shared_memory
                assert tile.columns >= NARROWEST
                blocks = -(-rows // 64)
                if tile in tiles:
                    assert 40 <= outputs // tile.columns * tile.split * blocks <= 300
                if product == "qkv":
                    assert config.embed_dim % tile.columns == 0
                if product in INTO_STREAM:
                    assert outputs // tile.columns <= len(kernels.sums)
                    assert outputs // tile.columns * blocks <= kernels._counters.numel()
                    assert tile.split * blocks * 64 * outputs <= kernels._parts.numel()
                else:
                    assert tile.split == 1


@pytest.mark.parametrize("model", LARGE)
def test_cases_of_a_gpu_are_few_enough_to_compile(model: str) -> None:
    """Each product and number of rows has the library's, and the tile of decoding in three ways."""
    config, rows, shared_memory = model_config(model), TuneConfig().rows, SHARED_MEMORY["9.0"]
    cases = all_cases(config, (*rows, rows[0]), shared_memory, pdl=True, float8=True)
    assert len(set(cases)) == len(cases)
    assert len({case._replace(rows=0) for case in cases if case.tile is not None}) <= 500
    for product in products(config):
        for number in rows:
            found = [case for case in cases if (case.product, case.rows) == (product, number)]
            assert found[0].tile is None
            chosen = [case for case in found if case.tile == chosen_tile(config, product, number, shared_memory)]
            assert [(case.pdl, case.float8) for case in chosen] == [(True, False), (False, False), (True, True)]
            assert chosen[0] == found[1]
    older = all_cases(config, rows, shared_memory, pdl=False, float8=False)
    assert not any(case.pdl or case.float8 for case in older)
    assert len(older) == len(cases) - 2 * len(rows) * len(products(config))


class MadeUpBench:
    """Without a GPU: a launch takes 2 µs, and tiles of 64 columns cannot be launched."""

    config = model_config("lpd_l")

    def chosen(self, product: str, rows: int) -> Tile:
        return chosen_tile(self.config, product, rows, SHARED_MEMORY["9.0"])

    def launches(self, num_bytes: float) -> int:
        return 24

    def linears(self, product: str, float8: bool, count: int) -> list[None]:
        return [None] * count

    def prepare(self, case: Case) -> None:
        if case.tile is not None and case.tile.columns == 64:
            raise OutOfResources(300_000, 232_448, "shared memory")

    def run(self, case: Case, linears: list[None]) -> None: ...

    def microseconds(self, run: Callable[[], None], launches: int) -> float:
        return 2.0


def test_what_cannot_be_launched_is_left_out_and_counted() -> None:
    bench: Any = MadeUpBench()
    report = Report(TuneConfig(), torch.device("cpu"))
    cases = all_cases(bench.config, (12, 78), SHARED_MEMORY["9.0"], pdl=True, float8=True)
    tune_kernels.time_products(bench, cases, report)
    found, left_out = report.content["products"], report.content["left_out"]
    assert left_out == {"OutOfResources": len([case for case in cases if case.tile and case.tile.columns == 64])}
    assert len(found) + left_out["OutOfResources"] == len(cases)
    first, second = found[:2]
    assert (first["product"], first["rows"], first["by"], first["columns"]) == ("qkv", 12, "library", None)
    assert (second["by"], second["columns"], second["pdl"], second["chosen"]) == ("own", 32, True, True)
    assert first["gb_per_s"] == pytest.approx(3 * 1024**2 * 2 / 2e-6 / 1e9)
    eight = [row for row in found if row["weights"] == "float8"]
    assert eight[0]["gb_per_s"] == pytest.approx(first["gb_per_s"] / 2)
    assert all(row["chosen"] for row in eight)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--device", "cpu"), "kernels are timed on a CUDA GPU, this is cpu."),
        (("--rows", 0), "--rows is 0"),
        (("--rows", 12, 129), "--rows is 129"),
        (("--compile_processes", 0), "--compile_processes is 0"),
    ],
)
def test_bad_input_is_named(arguments: tuple[object, ...], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tune_kernels.main, *arguments) == 2
    assert named in capfd.readouterr().err


@pytest.mark.gpu
def test_gpu_times_a_small_model(tmp_path: Path) -> None:
    output = tmp_path / "tiles.json"
    settings = ("--model", "lpd_tiny", "--rows", 12, "--compile_processes", 1)
    assert run(tune_kernels.main, *settings, "--output", output) == 0
    content = json.loads(output.read_text())
    assert len(content["attention"]) == 3
    assert {row["product"] for row in content["products"]} == {"qkv", "proj", "fc1", "fc2", "head"}
    assert all(row["us"] > 0 for row in content["products"])
