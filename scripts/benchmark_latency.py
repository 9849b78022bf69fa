"""Wall-clock time of generation: decode paths, batch sizes and one-by-one decoding compared in one run.

    python -m scripts.benchmark_latency --rows all --startup --output RESULTS.json
    python -m scripts.benchmark_latency --rows lpd_l_res256_steps20 --one_by_one --output RESULTS.json
    python -m scripts.benchmark_latency --model lpd_l --img_size 256 --generation_steps 20 --device cpu --threads 2

Rows are named like the published evaluations. The model's weights are random: time does not depend on them. Prints a
table and, as the last line, everything as JSON; the output file is written after every measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.decoding.decoder import DECODE_PATHS, Decoder, resolve_path
from engine.decoding.latency import PUBLISHED_RUNS, PUBLISHED_WARMUP, measure_latency
from engine.decoding.loop import draw_codes
from engine.evaluation.outputs import describe_environment
from engine.recipes import EVAL_RECIPES, EXPECTED
from models import MODEL_SIZES, model_config
from models.flops import decoding_flops
from models.lpd import LPD, LPDConfig
from models.sampling import Sampling, guide, sample
from orders import group_sizes
from scripts.device_limits import Marks, copy_bytes, matrix_product_flops
from tokenizers import VQConfig, VQModel, load_tokenizer
from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, setting
from util.dist import Dist, resolve_device
from util.files import write_json

WEIGHT_BYTES = {"packed_float16": 2, "packed_int8": 1}  # per weight, where the path decides it


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure. Settings that are None by default follow the device (:meth:`for_device`)."""

    rows: tuple[str, ...] | None = setting(None, "published rows, or all", choices=("all", *EVAL_RECIPES))
    model: str = setting("lpd_l", "without --rows: size", choices=tuple(MODEL_SIZES))
    img_size: int = setting(256, "without --rows: pixels")
    generation_steps: int = setting(20, "without --rows: decoding steps")
    cfg: float = setting(4.0, "without --rows: guidance scale; 1 decodes without the second half")
    vqgan_path: Path | None = setting(None, "tokenizer (default: random weights of the published architecture)")
    batch_sizes: tuple[int, ...] = setting((1, 64), "images per call", at_least=1)
    paths: tuple[str, ...] = setting(
        None, "decode paths (default: plain compiled graph on a GPU, else plain auto)", choices=DECODE_PATHS
    )
    one_by_one: bool = setting(False, "one token at a time too: batch 1, codes only, a 50th of the runs")
    warmup: int = setting(
        None, f"runs before the measured ones (default: {PUBLISHED_WARMUP} on a GPU, else 1)", at_least=0
    )
    runs: int = setting(None, f"measured runs (default: {PUBLISHED_RUNS} on a GPU, else 5)", at_least=1)
    bf16: bool = setting(None, "bfloat16 (default: on a GPU)")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = setting(None, "of the CPU (default: torch's)", at_least=1)
    startup: bool = setting(False, "start-up of every row's auto path in new processes, cache cold and warm")
    profile: Path | None = setting(None, "folder for a table of the kernels of one call of each measured decoder")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        check(self)

    def for_device(self, device: torch.device) -> BenchmarkConfig:
        """Without None. UserError for a path that the device does not have."""
        chosen: dict[str, Any] = {"paths": ("plain", "auto"), "warmup": 1, "runs": 5, "bf16": False}
        if device.type == "cuda":
            chosen = {"paths": ("plain", "compiled", "graph"), "warmup": PUBLISHED_WARMUP, "runs": PUBLISHED_RUNS}
            chosen["bf16"] = True
        chosen = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **chosen)
        for path in config.paths:
            resolve_path(path, device, torch.float32, config.bf16)
        return config


@dataclass(frozen=True)
class Row:
    """One model and schedule to measure."""

    name: str
    config: LPDConfig
    steps: int
    cfg: float

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return group_sizes(self.config.img_size, self.steps, self.config.stride)

    def one_by_one(self) -> Row:
        return dataclasses.replace(self, name=f"{self.name}, one by one", steps=self.config.num_tokens)

    def random_model(self, device: torch.device) -> LPD:
        torch.manual_seed(0)
        with torch.device(device):
            return LPD(self.config).eval()


def choose_rows(config: BenchmarkConfig) -> list[Row]:
    if config.rows is None:
        name = f"{config.model}_{config.img_size}_steps{config.generation_steps}"
        model = model_config(config.model, img_size=config.img_size)
        return [Row(name, model, config.generation_steps, config.cfg)]
    recipes = [(name, EVAL_RECIPES[name]) for name in (EVAL_RECIPES if "all" in config.rows else config.rows)]
    return [
        Row(name, model_config(row["model"], img_size=row["img_size"]), row["generation_steps"], row["cfg"])
        for name, row in recipes
    ]


def measure_draw(device: torch.device, vocab_size: int, sampling: Sampling) -> dict[str, float]:
    """The whole draw of a step of 20 tokens, with noise that belongs to each image and with torch's own generator."""
    batch = 64 if device.type == "cuda" else 1
    seeds, positions = torch.arange(batch, device=device), torch.arange(20, device=device).repeat(batch, 1)
    logits, weights = torch.randn(2 * batch, 20, vocab_size, device=device), torch.ones(20, device=device)

    def plain_draw() -> torch.Tensor:
        conditional, unconditional = logits.chunk(2)
        noise = torch.empty_like(conditional).exponential_()
        return sample(guide(conditional, unconditional, weights), noise, sampling.temperature)

    def own_draw() -> torch.Tensor:
        return draw_codes(logits, weights, seeds, positions, sampling)

    seconds = []
    for run in (own_draw, plain_draw):
        if device.type == "cuda":
            run = torch.compile(run)
        marks = Marks(device)
        for _ in range(31):
            marks.mark()
            run()
        marks.mark()
        seconds.append(statistics.median(marks.seconds()[10:]))
    return {"batch_size": batch, "own_noise_sec": seconds[0], "torch_noise_sec": seconds[1]}


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

    def __init__(self, config: BenchmarkConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.environment, self.load_before = describe_environment(Dist(0, 1, device)), os.getloadavg()[0]
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.limits = {"bytes_per_sec": copy_bytes(device), "flops_per_sec": matrix_product_flops(device, dtype)}
        self.results: list[dict[str, Any]] = []
        self.startup: list[dict[str, Any]] = []
        self.draw: dict[str, float] | None = None
        tokenizer = random_tokenizer() if config.vqgan_path is None else load_tokenizer(config.vqgan_path)
        self.tokenizer = tokenizer.to(device).eval()

    def output(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "bf16": self.config.bf16,
            "threads": torch.get_num_threads(),
            "load_before": self.load_before,
            "limits": self.limits,
            "draw": self.draw,
            "results": self.results,
            "startup": self.startup,
        }

    def save(self) -> None:
        if self.config.output is not None:
            write_json(self.config.output, self.output())

    def measure_row(self, row: Row) -> None:
        config = self.config
        model = row.random_model(self.device)
        for batch_size, path, pixels in itertools.product(config.batch_sizes, config.paths, (False, True)):
            self.measure(row, model, pixels, batch_size, path, config.runs)
        if config.one_by_one:
            for path in config.paths:
                self.measure(row.one_by_one(), model, False, 1, path, max(1, config.runs // 50))

    def measure(self, row: Row, model: LPD, pixels: bool, batch_size: int, path: str, runs: int) -> None:
        """Time one decoder, add it to the results and save them."""
        decoder, first_call_sec = self.first_call(row, model, pixels, batch_size, path)
        warmup = min(self.config.warmup, runs)
        latency = measure_latency(decoder, warmup, runs, progress=f"{row.name}, {path}, batch {batch_size}")
        result = {
            "row": row.name,
            "steps": row.steps,
            "batch_size": batch_size,
            "path": decoder.path,
            "pixels": pixels,
            "warmup": warmup,
            "runs": latency.runs,
            "median_ms": 1000 * latency.median_s,
            "p10_ms": 1000 * latency.p10_s,
            "p90_ms": 1000 * latency.p90_s,
            "images_per_sec": latency.images_per_sec,
            "first_call_sec": first_call_sec,
            **self.rates(row, model, decoder, latency.median_s),
            **self.memory(),
        }
        if row.name in EXPECTED:
            published = EXPECTED[row.name]
            figures = {"latency_ms": 1000 * published.latency_s, "images_per_sec": published.images_per_sec}
            result["published_a100"] = figures
        if self.config.profile is not None:
            name = f"{row.name}_{decoder.path}_batch{batch_size}{'' if pixels else '_tokens'}.txt"
            write_profile(decoder, self.config.profile / name.replace(", ", "_").replace(" ", "_"))
        self.results.append(result)
        self.save()

    def first_call(self, row: Row, model: LPD, pixels: bool, batch_size: int, path: str) -> tuple[Decoder, float]:
        """A decoder, and the seconds until it has given its first images, in a process that may be warm."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        tokenizer, bf16 = self.tokenizer if pixels else None, self.config.bf16
        decoder = Decoder(
            model, row.group_sizes, Sampling(row.cfg), batch_size, tokenizer=tokenizer, path=path, bf16=bf16
        )
        measure_latency(decoder, 0, 1)
        return decoder, time.perf_counter() - start

    def rates(self, row: Row, model: LPD, decoder: Decoder, seconds: float) -> dict[str, float]:
        """Bytes of weights read and FLOPs per second of a call, and their shares of what the device can do."""
        flops = decoding_flops(row.config, row.group_sizes, row.cfg != 1.0)
        if decoder.tokenizer is not None:
            flops += vq_decode_flops(self.tokenizer, row.config)
        weights = sum(p.numel() for p in (*model.blocks.parameters(), *model.head.parameters()))
        weight_bytes = weights * row.steps * WEIGHT_BYTES.get(decoder.path, 2 if self.config.bf16 else 4)
        bytes_per_sec, flops_per_sec = weight_bytes / seconds, decoder.batch_size * flops / seconds
        return {
            "weight_bytes_per_sec": bytes_per_sec,
            "weight_bytes_share": bytes_per_sec / self.limits["bytes_per_sec"],
            "flops_per_sec": flops_per_sec,
            "flops_share": flops_per_sec / self.limits["flops_per_sec"],
        }

    def memory(self) -> dict[str, float]:
        if self.device.type != "cuda":  # of the process so far
            return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        free, total = torch.cuda.mem_get_info(self.device)
        peak = torch.cuda.max_memory_reserved(self.device)
        return {
            "peak_memory_gib": peak / 2**30,
            "device_memory_gib": (total - free) / 2**30,  # with graphs and libraries
        }


def write_profile(decoder: Decoder, path: Path) -> None:
    """One call's kernels (operators on a CPU) by their time."""
    kind = decoder.device.type
    activities = [torch.profiler.ProfilerActivity.CPU]
    if kind == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        measure_latency(decoder, 0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=40))


def measure_startup(row: Row) -> dict[str, Any]:
    """Seconds to the first images of the auto path in two new processes that share an empty compile cache."""
    command = [sys.executable, "-m", "scripts.benchmark_latency", *sys.argv[1:], "--first_call_of", row.name]
    with tempfile.TemporaryDirectory() as cache:
        places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        seconds = []
        for _ in range(2):
            child = subprocess.run(command, env=os.environ | places, check=True, stdout=subprocess.PIPE, text=True)
            seconds.append(float(child.stdout.splitlines()[-1]))
    return {"row": row.name, "cold_sec": seconds[0], "warm_sec": seconds[1]}


def print_table(results: list[dict[str, Any]]) -> None:
    heads = ("median ms", "p10", "p90", "images/s", "bytes/s", "FLOP/s", "GiB")
    print(f"\n{'row':42} {'path':>14} {'batch':>5} {'pixels':>6}", *(f"{head:>9}" for head in heads))
    for r in results:
        figures = [r[name] for name in ("median_ms", "p10_ms", "p90_ms", "images_per_sec")]
        shares = [r["weight_bytes_share"], r["flops_share"]]
        print(
            f"{r['row']:42} {r['path']:>14} {r['batch_size']:5} {'yes' if r['pixels'] else 'no':>6}",
            *(f"{figure:9.2f}" for figure in figures),
            *(f"{share:9.1%}" for share in shares),
            f"{r['peak_memory_gib']:9.2f}",
        )


def main() -> None:
    parser = Parser(prog="python -m scripts.benchmark_latency", description=__doc__)
    parser.add_config(BenchmarkConfig)
    parser.add_argument("--first_call_of", help=argparse.SUPPRESS)  # in the processes of --startup
    args = parser.parse_args()
    device = resolve_device(args.device)
    config = from_args(BenchmarkConfig, args).for_device(device)
    rows = choose_rows(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    benchmark = Benchmark(config, device)
    if args.first_call_of is not None:
        row = next(row for row in rows if row.name == args.first_call_of)
        print(benchmark.first_call(row, row.random_model(device), True, 1, "auto")[1])
        return
    for row in rows:
        benchmark.measure_row(row)
        if config.startup:
            benchmark.startup.append(measure_startup(row))
            benchmark.save()
    # Last, so that what it compiles does not shorten a start-up that is measured.
    benchmark.draw = measure_draw(device, benchmark.tokenizer.config.codebook_size, Sampling(cfg=2.0))
    print_table(benchmark.results)
    benchmark.save()
    print(json.dumps(benchmark.output()))


if __name__ == "__main__":
    exit_on_user_error(main)
