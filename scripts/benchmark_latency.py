"""Wall-clock time of generation: decode paths, batch sizes and one-by-one decoding compared in one run.

    python -m scripts.benchmark_latency --rows all --startup --output RESULTS.json
    python -m scripts.benchmark_latency --rows lpd_l_res256_steps20 --one_by_one --output RESULTS.json
    python -m scripts.benchmark_latency --model lpd_l --img_size 256 --generation_steps 20 --device cpu --threads 2

Rows are named like the published evaluations. The model's weights are random: time does not depend on them. Prints a
row of each measurement and, as the last line, everything as JSON; the output file is written after every measurement.

Two shares of what the device can do are given: the rate at which weights are read, once a step, of that of a copy, and
the time that the FLOPs would take at the rate of a large product in the same arithmetic, of the measured time. A share
above 1 says that the limit was measured on a busy device; it is null then, and `not_measured` says so. `speed_up` is
the plain path's median, of the same row, batch and output in the same run, over this one; null without that path.
`host_us` is the median until the call returned, while the GPU goes on with it; null on a CPU, where the call is the
work. `graph_nodes` is the size of a captured CUDA graph; where there is a `node_budget`, `within_node_budget` says
whether it is kept.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.decoding.decoder import DECODE_PATHS, Decoder, resolve_path
from engine.decoding.latency import PUBLISHED_RUNS, PUBLISHED_WARMUP, measure_latency
from engine.decoding.loop import draw_codes
from engine.recipes import EVAL_RECIPES
from models import MODEL_SIZES, model_config
from models.flops import decoding_flops
from models.lpd import LPD, LPDConfig
from models.sampling import Sampling, guide, noise_keys, sample
from orders import group_sizes
from scripts.benchmarking import (
    BenchmarkConfig,
    Report,
    copy_bytes,
    forget_memory,
    matrix_product_flops,
    peak_memory_gib,
    read_config,
    share,
    speed_up,
    time_runs,
)
from tokenizers import VQConfig, VQModel, load_tokenizer
from util.cli import exit_on_user_error
from util.config import MAX_COUNT, MAX_SIDE, record, setting
from util.files import check_output_dir

# Where the path decides it: bytes per weight of blocks and head, and what the model's products are calculated in.
WEIGHT_BYTES = {"packed_float16": (2, 2), "packed_bfloat16": (2, 4), "packed_int8": (1, 1), "graph_float8": (1, 1)}
ARITHMETIC = {"packed_bfloat16": torch.bfloat16, "packed_int8": torch.int8}
NODE_BUDGET = 2600  # of the CUDA graph for the codes of one image, LPD-L, 256 px, 20 steps, guided, own kernels


@dataclass(frozen=True, kw_only=True)
class LatencyBenchmark(BenchmarkConfig):
    """What to measure; what is None by default follows the device."""

    rows: tuple[str, ...] | None = setting(None, "published rows, or all", choices=("all", *EVAL_RECIPES))
    model: str = setting("lpd_l", "without --rows: size", choices=tuple(MODEL_SIZES))
    img_size: int = setting(256, "without --rows: pixels", at_least=1, at_most=MAX_SIDE)
    generation_steps: int = setting(20, "without --rows: decoding steps", at_least=1, at_most=MAX_COUNT)
    cfg: float = setting(
        4.0, "without --rows: guidance scale; 1 decodes without the second half", at_least=1, at_most=1e6
    )
    vqgan_path: Path | None = setting(None, "tokenizer (default: random weights of the published architecture)")
    batch_sizes: tuple[int, ...] = setting(None, "images per call (default: 1 64 on a GPU, else 1 8)", at_least=1)
    paths: tuple[str, ...] = setting(
        None,
        "decode paths (default: plain compiled graph_library graph on a GPU, else plain auto)",
        choices=DECODE_PATHS,
    )
    one_by_one: bool = setting(False, "one token at a time too: batch 1, codes only, a 50th of the runs")
    warmup: int = setting(
        None, f"runs before the measured ones (default: {PUBLISHED_WARMUP} on a GPU, else 1)", at_least=0
    )
    runs: int = setting(None, f"measured runs (default: {PUBLISHED_RUNS} on a GPU, else 5)", at_least=1)
    batch_runs: int | None = setting(None, "measured runs of batches above 1 (default: --runs)", at_least=1)
    outputs: tuple[str, ...] = setting(("codes", "pixels"), "what a call makes", choices=("codes", "pixels"))
    bf16: bool = setting(None, "bfloat16 (default: on a GPU)")
    startup: bool = setting(False, "start-up of every row's auto path in new processes, cache cold and warm")
    first_call_of: str | None = setting(None, "print the seconds to the first images of this row and stop (--startup)")
    profile: Path | None = setting(None, "folder for a table of the kernels of one call of each measured decoder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None:
            check_output_dir(self.profile)

    def chosen_rows(self) -> list[Row]:
        recipes = {f"{self.model}_{self.img_size}_steps{self.generation_steps}": record(self)}
        if self.rows is not None:
            recipes = {name: EVAL_RECIPES[name] for name in (EVAL_RECIPES if "all" in self.rows else self.rows)}
        return [
            Row(name, model_config(row["model"], img_size=row["img_size"]), row["generation_steps"], row["cfg"])
            for name, row in recipes.items()
        ]


class Row(NamedTuple):
    """One model and schedule to measure."""

    name: str
    config: LPDConfig
    steps: int
    cfg: float

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return group_sizes(self.config.img_size, self.steps, self.config.stride)

    def node_budget(self, batch_size: int, path: str, pixels: bool) -> int | None:
        """How many nodes the CUDA graph may have; None where nothing is laid down."""
        of_model = self.config == model_config("lpd_l", img_size=256) and self.steps == 20 and self.cfg != 1.0
        return NODE_BUDGET if of_model and (batch_size, path, pixels) == (1, "graph", False) else None

    def random_model(self, device: torch.device) -> LPD:
        torch.manual_seed(0)
        with torch.device(device):
            return LPD(self.config).eval()


def measure_draw(device: torch.device, vocab_size: int) -> dict[str, float]:
    """The whole draw of a step of 20 tokens, with noise that belongs to each image and with torch's own generator."""
    batch = 64 if device.type == "cuda" else 1
    seeds, positions = torch.arange(batch, device=device), torch.arange(20, device=device).repeat(batch, 1)
    logits, weights = torch.randn(2 * batch, 20, vocab_size, device=device), torch.ones(20, device=device)

    def own_noise() -> torch.Tensor:
        return draw_codes(logits, weights, noise_keys(seeds, positions), Sampling(cfg=2.0))

    def torch_noise() -> torch.Tensor:
        conditional, unconditional = logits.chunk(2)
        return sample(guide(conditional, unconditional, weights), torch.empty_like(conditional).exponential_())

    own, plain = (
        statistics.median(time_runs(torch.compile(run) if device.type == "cuda" else run, 30, device)[10:])
        for run in (own_noise, torch_noise)
    )
    return {"batch_size": batch, "own_noise_sec": own, "torch_noise_sec": plain}


def random_tokenizer() -> VQModel:
    """The published architecture, without the zeros of new residual branches, on which GPUs calculate faster."""
    tokenizer = VQModel(VQConfig())
    for parameter in tokenizer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return tokenizer


def vq_decode_flops(tokenizer: VQModel, config: LPDConfig) -> int:
    """FLOPs of decoding the codes of one image."""
    with torch.device("meta"):
        twin = VQModel(tokenizer.config)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            twin.decode(torch.zeros(1, config.num_tokens, dtype=torch.int64))
    return counter.get_total_flops()


class Benchmark:
    """Measures decoders on one device."""

    def __init__(self, config: LatencyBenchmark, device: torch.device) -> None:
        # Refuses what the device does not have.
        resolved = [resolve_path(path, device, torch.float32, config.bf16) for path in config.paths]
        self.config, self.device = config, device
        self.report = Report(config, device)
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        kinds = dict.fromkeys([self.dtype, *(ARITHMETIC.get(path, self.dtype) for path in resolved)])
        self.copy_bytes = copy_bytes(device)
        self.product_flops = {kind: matrix_product_flops(device, kind) for kind in kinds}
        flops = {str(kind).removeprefix("torch."): rate for kind, rate in self.product_flops.items()}
        self.report.content["limits"] = {"bytes_per_sec": self.copy_bytes, "flops_per_sec": flops}
        self.paths = sorted(config.paths, key="plain".__ne__)  # plain first: the others are compared with it
        self.plain_sec: dict[tuple[str, int, bool], float] = {}  # by row, batch size and whether there are pixels
        tokenizer = random_tokenizer() if config.vqgan_path is None else load_tokenizer(config.vqgan_path)
        self.tokenizer = tokenizer.to(device).eval()

    def measure_row(self, row: Row) -> None:
        config, model = self.config, row.random_model(self.device)
        for batch_size, path, output in itertools.product(config.batch_sizes, self.paths, config.outputs):
            runs = config.batch_runs if batch_size > 1 and config.batch_runs is not None else config.runs
            self.measure(row, model, output == "pixels", batch_size, path, runs)
        if config.one_by_one:
            single = row._replace(name=f"{row.name}, one by one", steps=row.config.num_tokens)
            for path in self.paths:
                self.measure(single, model, False, 1, path, max(1, config.runs // 50))

    def measure(self, row: Row, model: LPD, pixels: bool, batch_size: int, path: str, runs: int) -> None:
        """Time one decoder and report it."""
        decoder, first_call_sec = self.first_call(row, model, pixels, batch_size, path)
        warmup = min(self.config.warmup, runs)
        latency = measure_latency(decoder, warmup, runs, progress=f"{row.name}, {path}, batch {batch_size}")
        path, seconds = decoder.path, latency.median_s
        if path == "plain":
            self.plain_sec[row.name, batch_size, pixels] = seconds
        for_blocks, for_head = WEIGHT_BYTES.get(path, (2, 2) if decoder.bf16 else (4, 4))
        weight_bytes = for_blocks * num_weights(model.blocks) + for_head * num_weights(model.head)
        bytes_per_sec = weight_bytes * row.steps / seconds
        flops = batch_size * decoding_flops(row.config, row.group_sizes, row.cfg != 1.0)
        pixel_flops = batch_size * vq_decode_flops(self.tokenizer, row.config) if pixels else 0
        pixel_dtype = torch.bfloat16 if decoder.bf16 else torch.float32
        shortest = flops / self.product_flops[ARITHMETIC.get(path, self.dtype)]
        shortest += pixel_flops / self.product_flops[pixel_dtype]
        bytes_share, flops_share = share(bytes_per_sec, self.copy_bytes), share(shortest, seconds)
        busy = None in (bytes_share, flops_share)
        nodes, budget = decoder.graph_nodes(), row.node_budget(batch_size, path, pixels)
        result = {
            "row": row.name,
            "steps": row.steps,
            "batch_size": batch_size,
            "path": path,
            "pixels": pixels,
            "warmup": warmup,
            "runs": latency.runs,
            "median_ms": 1000 * seconds,
            "p10_ms": 1000 * latency.p10_s,
            "p90_ms": 1000 * latency.p90_s,
            "host_us": None if latency.host_s is None else 1e6 * latency.host_s,
            "images_per_sec": latency.images_per_sec,
            "speed_up": speed_up(seconds, self.plain_sec.get((row.name, batch_size, pixels))),
            "first_call_sec": first_call_sec,
            "weight_bytes_per_sec": bytes_per_sec,
            "weight_bytes_share": bytes_share,
            "flops_per_sec": (flops + pixel_flops) / seconds,
            "flops_share": flops_share,
            "not_measured": "a share above 1: its limit was measured on a busy device" if busy else None,
            "peak_memory_gib": peak_memory_gib(self.device),
            "graph_nodes": nodes,
            "node_budget": budget,
            "within_node_budget": None if nodes is None or budget is None else nodes <= budget,
        }
        if self.config.profile is not None:
            name = f"{row.name}_{path}_batch{batch_size}{'' if pixels else '_tokens'}.txt"
            write_profile(decoder, self.config.profile / name.replace(", ", "_").replace(" ", "_"))
        self.report.add("results", result)

    def first_call(self, row: Row, model: LPD, pixels: bool, batch_size: int, path: str) -> tuple[Decoder, float]:
        """A decoder, and the seconds until it has given its first images, in a process that may be warm."""
        forget_memory(self.device)
        start = time.perf_counter()
        tokenizer = self.tokenizer if pixels else None
        sampling, bf16 = Sampling(row.cfg), self.config.bf16
        decoder = Decoder(model, row.group_sizes, sampling, batch_size, tokenizer=tokenizer, path=path, bf16=bf16)
        measure_latency(decoder, 0, 1)
        return decoder, time.perf_counter() - start


def num_weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def write_profile(decoder: Decoder, path: Path) -> None:
    """One call's kernels (operators on a CPU) by their time."""
    with torch.profiler.profile() as profile:
        measure_latency(decoder, 0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.key_averages().table(sort_by=f"self_{decoder.device.type}_time_total", row_limit=40))


def measure_startup(row: Row) -> dict[str, Any]:
    """Seconds to the first images of the auto path in two new processes that share an empty compile cache."""
    command = [sys.executable, "-m", "scripts.benchmark_latency", *sys.argv[1:], "--first_call_of", row.name]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        cold, warm = (
            float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout.split()[-1])
            for _ in range(2)
        )
    return {"row": row.name, "cold_sec": cold, "warm_sec": warm}


def main() -> None:
    config, device = read_config(LatencyBenchmark, __doc__)
    cuda = device.type == "cuda"
    config = config.with_defaults(
        batch_sizes=(1, 64) if cuda else (1, 8),
        paths=("plain", "compiled", "graph_library", "graph") if cuda else ("plain", "auto"),
        warmup=PUBLISHED_WARMUP if cuda else 1,
        runs=PUBLISHED_RUNS if cuda else 5,
        bf16=cuda,
    )
    torch.manual_seed(0)
    benchmark = Benchmark(config, device)
    for row in config.chosen_rows():
        if config.first_call_of is None:
            benchmark.measure_row(row)
            if config.startup:
                benchmark.report.add("startup", measure_startup(row))
        elif config.first_call_of == row.name:
            return print(benchmark.first_call(row, row.random_model(device), True, 1, "auto")[1])
    # Last, so that what it compiles does not shorten a start-up that is measured.
    benchmark.report.content["draw"] = measure_draw(device, benchmark.tokenizer.config.codebook_size)
    benchmark.report.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
