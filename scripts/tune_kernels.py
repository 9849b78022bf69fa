"""Time the ways to cut each product of a decoding step on this GPU, beside the library's product; and the attention.

    python -m scripts.tune_kernels --model lpd_l --rows 12 26 52 78 104 128 --output TILES.json

Launches are timed in a CUDA graph that goes through more weights (or keys and values) than the GPU's cache holds, as
decoding does, so that each reads its own from memory. Rows of `products`: the library's product, in bfloat16 and
without bias; our own with each candidate of a tile, which does norm, bias, GELU and residual as well; and with the tile
that `models.decode_kernels.choose_tile` takes also without programmatic dependent launch and with float8 weights. Rows
of the head are queries. `gb_per_s` counts the weights. Tiles that cannot be launched are left out, and counted in
`left_out` by what was raised. Prints a row of each measurement and, as the last line, everything as JSON.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from models import MODEL_SIZES, model_config
from models.decode_kernels import NARROWEST, Linear, StepKernels, Tile, attend, choose_tile, has_pdl
from models.fused import MAX_ROWS, has_kernels
from models.lpd import LPDConfig
from scripts.benchmarking import BenchmarkConfig, Report, read_config, time_runs
from util.cli import exit_on_user_error
from util.config import setting
from util.errors import UserError

COLUMNS, BLOCKS, SPLITS, STAGES = (NARROWEST, 32, 64, 128), (64, 128), (1, 2, 4), (3, 5, 7)
PROGRAMS = range(40, 301)  # of a launch: enough for a chip of a hundred multiprocessors, not many turns of it
INTO_STREAM = ("proj", "fc2")  # products that are added to the residual stream, and may be split
BEFORE = {"qkv": "fc2", "fc1": "proj", "head": "fc2"}  # whose partial sums a norm reads
ATTENTION = ((10, 6), (80, 20), (217, 40))  # kept rows and rows of a sequence: early, middle and last step
LAUNCHES = (24, 512)  # of a graph: at least, at most


@dataclass(frozen=True, kw_only=True)
class TuneConfig(BenchmarkConfig):
    """What is timed."""

    model: str = setting("lpd_l", "size", choices=tuple(MODEL_SIZES))
    rows: tuple[int, ...] = setting(
        (12, 26, 52, 78, 104, 128), "rows of a product, all sequences together", at_least=1, at_most=MAX_ROWS
    )
    compile_processes: int = setting(None, "processes that compile (default: CPU cores - 1)", at_least=1)


class Case(NamedTuple):
    """One way to do one product; without a tile the library's."""

    product: str
    rows: int
    tile: Tile | None
    pdl: bool = False
    float8: bool = False


def products(config: LPDConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each product."""
    D, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    return {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, hidden), "fc2": (hidden, D), "head": (D, config.vocab_size)}


def candidates(config: LPDConfig, product: str, rows: int, shared_memory: int) -> list[Tile]:
    """Tiles that divide the product, occupy the chip and fit into its shared memory, bytes of a program."""
    inputs, outputs = products(config)[product]
    tiles = []
    for columns, block, split, stages in itertools.product(COLUMNS, BLOCKS, SPLITS, STAGES):
        # Queries, keys and values are apart at multiples of the width.
        divides = outputs % columns == config.embed_dim % columns == 0 and inputs % (split * block) == 0
        may_split = product in INTO_STREAM or split == 1
        fits = stages * block * (columns + 64) * 2 <= shared_memory and stages <= inputs // (split * block) + 1
        if divides and may_split and fits and outputs // columns * split * math.ceil(rows / 64) in PROGRAMS:
            tiles.append(Tile(columns, block, split, stages))
    return tiles


def chosen_tile(config: LPDConfig, product: str, rows: int, shared_memory: int) -> Tile:
    """The tile of this product in decoding."""
    return choose_tile(*products(config)[product], rows, product in INTO_STREAM, shared_memory)


def all_cases(config: LPDConfig, rows: Sequence[int], shared_memory: int, pdl: bool, float8: bool) -> list[Case]:
    """What is timed, by product and rows.

    Args:
        shared_memory: bytes that a program may have.
        pdl, float8: whether the device has programmatic dependent launch, and 8-bit floating point.
    """
    cases = []
    for product, number in itertools.product(products(config), dict.fromkeys(rows)):
        chosen = chosen_tile(config, product, number, shared_memory)
        tiles = dict.fromkeys([chosen, *candidates(config, product, number, shared_memory)])
        cases += [Case(product, number, None), *(Case(product, number, tile, pdl) for tile in tiles)]
        cases += [Case(product, number, chosen)] if pdl else []
        cases += [Case(product, number, chosen, pdl, float8=True)] if float8 else []
    return cases


class Bench:
    """Launches of products of a model, one sequence of random rows."""

    def __init__(self, config: LPDConfig, device: torch.device) -> None:
        self.config, self.device, self.stream = config, device, torch.cuda.Stream(device)
        D, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.kernels = k = StepKernels(MAX_ROWS, D, config.num_heads, hidden, device)
        for tensor in (k.stream, k.narrow, k.query, k.attended, k.hidden_rows):
            tensor.normal_()
        heads = (config.num_heads, MAX_ROWS, D // config.num_heads)
        self.cache = torch.empty(2, 1, *heads, device=device, dtype=torch.bfloat16)
        self.logits = torch.empty(MAX_ROWS, config.vocab_size, device=device)
        self.before = {product: self.linears(product, False, 1)[0] for product in INTO_STREAM}

    def chosen(self, product: str, rows: int) -> Tile:
        """The tile of this product in decoding on this device."""
        return chosen_tile(self.config, product, rows, self.kernels.shared_memory)

    def linears(self, product: str, float8: bool, count: int) -> list[Linear]:
        """Random layers."""
        inputs, outputs = products(self.config)[product]
        dtype = torch.float8_e4m3fn if float8 else torch.bfloat16
        random = partial(torch.randn, device=self.device, dtype=torch.bfloat16)
        return [Linear.of(random(outputs, inputs) / inputs**0.5, random(outputs), dtype) for _ in range(count)]

    def run(self, case: Case, linears: Sequence[Linear]) -> None:
        """One launch for each layer."""
        for linear in linears:
            if case.tile is None:
                torch.nn.functional.linear(self._inputs(case.product)[: case.rows], linear.weight)
            else:
                self._launch(case.product, linear, case.rows, case.tile)

    def prepare(self, case: Case) -> None:
        """Write the partial sums that the product before leaves behind."""
        self.kernels.pdl = case.pdl
        if case.product in BEFORE and case.tile is not None:
            before = BEFORE[case.product]
            self._launch(before, self.before[before], case.rows, self.chosen(before, case.rows))

    def _inputs(self, product: str) -> Tensor:
        inputs = {"proj": self.kernels.attended, "fc2": self.kernels.hidden_rows}
        return inputs.get(product, self.kernels.narrow)

    def _launch(self, product: str, linear: Linear, rows: int, tile: Tile) -> None:
        if product in INTO_STREAM:
            self.kernels.add_product(linear, self._inputs(product), rows, tile)
        elif product == "qkv":
            self.kernels.project_in(linear, self.cache, 0, rows, tile)
        else:
            out = self.kernels.hidden_rows if product == "fc1" else self.logits
            self.kernels.apply(linear, out, 1, rows, rows, product == "fc1", tile)

    def launches(self, num_bytes: float) -> int:
        """Of a graph in which each launch reads so many bytes of its own: what is four times the cache in all."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(max(LAUNCHES[0], math.ceil(4 * cache / num_bytes)), LAUNCHES[1])

    def microseconds(self, run: Callable[[], None], launches: int) -> float:
        """Of one launch, all of them in a CUDA graph: the median of several replays."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            run()
        return 1e6 * statistics.median(time_runs(graph.replay, 7, self.device)[2:]) / launches


def compile_cases(config: LPDConfig, device: torch.device, cases: Sequence[Case]) -> None:
    """Launch each once, so that compiled kernels lie in Triton's folder."""
    torch.cuda.set_device(device)
    bench = Bench(config, device)
    linears: dict[tuple[str, bool], list[Linear]] = {}
    for case in cases:
        kind = case.product, case.float8
        linears[kind] = linears.get(kind) or bench.linears(*kind, 1)
        try:
            bench.prepare(case)
            bench.run(case, linears[kind])
        except TritonError:  # raised again when it is timed
            continue
    torch.cuda.synchronize()


def compile_all(config: LPDConfig, device: torch.device, cases: Sequence[Case], processes: int) -> None:
    """Compile in several processes. One process has all numbers of rows of a kernel, which it compiles once."""
    kernels: dict[Case, list[Case]] = {}
    for case in cases:
        if case.tile is not None:
            kernels.setdefault(case._replace(rows=0), []).append(case)
    parts = [list(itertools.chain(*list(kernels.values())[i::processes])) for i in range(processes)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(compile_cases, config, device), parts))  # raises what a process raised


def time_products(bench: Bench, cases: Sequence[Case], report: Report) -> None:
    """A row for each case."""
    left_out = report.content["left_out"] = Counter[str]()
    for product, group in itertools.groupby(cases, key=lambda case: case.product):
        inputs, outputs = products(bench.config)[product]
        linears: dict[bool, list[Linear]] = {}
        for case in group:
            num_bytes = inputs * outputs * (1 if case.float8 else 2)
            if case.float8 not in linears:
                linears[case.float8] = bench.linears(product, case.float8, bench.launches(num_bytes))
            layers = linears[case.float8]
            try:
                bench.prepare(case)
                us = bench.microseconds(partial(bench.run, case, layers), len(layers))
            except TritonError as error:
                left_out[type(error).__name__] += 1
                continue
            tile = dict.fromkeys(field.name for field in fields(Tile)) if case.tile is None else asdict(case.tile)
            row = {
                "product": product,
                "rows": case.rows,
                "by": "library" if case.tile is None else "own",
                "weights": "float8" if case.float8 else "bfloat16",
                "pdl": case.pdl,
                "us": us,
                "gb_per_s": num_bytes / us / 1e3,
            }
            report.add("products", row | tile | {"chosen": case.tile == bench.chosen(product, case.rows)})


def time_attention(bench: Bench, report: Report) -> None:
    """A row for each number of kept rows and rows of two sequences, half of them context."""
    k, heads, sequences = bench.kernels, bench.config.num_heads, 2
    for length, rows in ATTENTION:
        shape = (2, sequences, heads, length + rows, k.width // heads)
        count = bench.launches(2 * math.prod(shape))
        caches = torch.randn(count, *shape, device=bench.device, dtype=torch.bfloat16)

        def run(length: int = length, rows: int = rows, caches: Tensor = caches) -> None:
            for cache in caches:
                attend(k.query, cache, k.attended, length, rows // 2, rows, has_pdl(bench.device))

        report.add("attention", {"length": length, "rows": rows, "us": bench.microseconds(run, count)})


def main() -> None:
    config, device = read_config(TuneConfig, __doc__)
    if device.type != "cuda":
        raise UserError(f"kernels are timed on a CUDA GPU, this is {device}.")
    config = config.with_defaults(compile_processes=max(1, len(os.sched_getaffinity(0)) - 1))
    model = model_config(config.model)
    if not has_kernels(model):
        raise UserError(f"--model {config.model}: there are no own kernels for so small a model; take a larger one.")
    torch.manual_seed(0)
    report = Report(config, device)
    bench = Bench(model, device)
    float8 = torch.cuda.get_device_capability(device) >= (8, 9)
    cases = all_cases(model, config.rows, bench.kernels.shared_memory, has_pdl(device), float8)
    compile_all(model, device, cases, config.compile_processes)
    time_products(bench, cases, report)
    time_attention(bench, report)
    report.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
