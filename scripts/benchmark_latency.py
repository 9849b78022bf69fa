"""Wall-clock time of generation: decode paths, batch sizes and one-by-one decoding compared in one run.

    python -m scripts.benchmark_latency --rows all --startup --output RESULTS.json
    python -m scripts.benchmark_latency --rows lpd_l_res256_steps20 --one_by_one --output RESULTS.json
    python -m scripts.benchmark_latency --model lpd_l --img_size 256 --generation_steps 20 --device cpu --threads 2

Rows are named like the published evaluations. Weights are random where no checkpoint is given. Prints a table and, as
the last line, everything as JSON; the output file is written after every measurement.
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
from models.lpd import LPD, LPDConfig, load_weights
from models.sampling import Sampling, guide, sample
from orders import group_sizes
from scripts.device_limits import Marks, copy_bytes, matrix_product_flops
from tokenizers import VQConfig, VQModel, load_tokenizer
from util.checkpoint import load_checkpoint
from util.cli import HelpFormatter, exit_on_user_error
from util.dist import Dist, resolve_device
from util.errors import UserError
from util.files import write_json

WEIGHT_BYTES = {"packed_float16": 2, "packed_int8": 1}  # per weight, where the path decides it


@dataclasses.dataclass(frozen=True)
class Row:
    """One model and schedule to measure."""

    name: str
    config: LPDConfig
    steps: int
    cfg: float

    @property
    def group_sizes(self) -> tuple[int, ...]:
        if self.steps == self.config.num_tokens:
            return (1,) * self.steps
        return tuple(group_sizes(self.config.img_size, self.steps, self.config.stride))

    def one_by_one(self) -> Row:
        return dataclasses.replace(self, name=f"{self.name}, one by one", steps=self.config.num_tokens)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", help=f"published rows, or all: {', '.join(EVAL_RECIPES)}")
    add("--model", choices=MODEL_SIZES, default="lpd_l", help="without --rows: size")
    add("--img_size", type=int, default=256, help="without --rows: pixels")
    add("--generation_steps", type=int, default=20, help="without --rows: decoding steps")
    add("--cfg", type=float, default=4.0, help="without --rows: guidance scale; 1 decodes without the second half")
    add("--pretrained_ckpt", type=Path, help="weights (default: random)")
    add("--vqgan_path", type=Path, help="tokenizer (default: random weights of the published architecture)")
    add("--batch_sizes", type=int, nargs="+", default=[1, 64], help="images per call")
    add("--paths", nargs="+", choices=DECODE_PATHS, help="(default: plain compiled graph on a GPU, else plain auto)")
    add("--pixels", choices=("both", "yes", "no"), default="both", help="with the VQ decoder, without, or both")
    add(
        "--one_by_one",
        action="store_true",
        help="one token at a time too: batch 1, codes only, a 50th of the runs",
    )
    add("--warmup", type=int, help=f"(default: {PUBLISHED_WARMUP} on a GPU, else 1)")
    add("--runs", type=int, help=f"measured runs (default: {PUBLISHED_RUNS} on a GPU, else 5)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on a GPU)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=int, help="of the CPU (default: torch's)")
    add(
        "--startup", action="store_true", help="start-up of every row's auto path in new processes, cache cold and warm"
    )
    add("--profile", type=Path, help="folder for a table of the kernels of one call of each measured decoder")
    add("--output", type=Path, help="JSON file for the results")
    return parser


def choose_rows(args: argparse.Namespace) -> list[Row]:
    if args.rows is None:
        config = model_config(args.model, img_size=args.img_size)
        return [
            Row(f"{args.model}_{args.img_size}_steps{args.generation_steps}", config, args.generation_steps, args.cfg)
        ]
    names = list(EVAL_RECIPES) if args.rows == ["all"] else args.rows
    if unknown := [name for name in names if name not in EVAL_RECIPES]:
        raise UserError(f"there is no row {unknown[0]!r}; choose all or some of {', '.join(EVAL_RECIPES)}.")
    rows = []
    for name in names:
        recipe = EVAL_RECIPES[name]
        config = model_config(recipe["model"], img_size=recipe["img_size"])
        rows.append(Row(name, config, recipe["generation_steps"], recipe["cfg"]))
    return rows


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
    """The published architecture. Fresh residual branches end in zeros, on which GPUs calculate faster."""
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

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.environment, self.load_before = describe_environment(Dist(0, 1, device)), os.getloadavg()[0]
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.limits = {"bytes_per_sec": copy_bytes(device), "flops_per_sec": matrix_product_flops(device, dtype)}
        self.results: list[dict[str, Any]] = []
        self.startup: list[dict[str, Any]] = []
        self.draw: dict[str, float] | None = None

    def output(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "bf16": self.args.bf16,
            "threads": torch.get_num_threads(),
            "load_before": self.load_before,
            "limits": self.limits,
            "draw": self.draw,
            "results": self.results,
            "startup": self.startup,
        }

    def save(self) -> None:
        if self.args.output is not None:
            write_json(self.args.output, self.output())

    def measure(self, row: Row, model: LPD, tokenizer: VQModel | None, batch_size: int, path: str, runs: int) -> None:
        """Time one decoder; `first_call_sec` is from its making to its first images, in a process that may be warm."""
        device, args = self.device, self.args
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        decoder = Decoder(
            model, row.group_sizes, Sampling(row.cfg), batch_size, tokenizer=tokenizer, path=path, bf16=args.bf16
        )
        measure_latency(decoder, 0, 1)
        first_call_sec = time.perf_counter() - start
        warmup = min(args.warmup, runs)
        latency = measure_latency(decoder, warmup, runs, progress=f"{row.name}, {path}, batch {batch_size}")
        flops = batch_size * decoding_flops(row.config, row.group_sizes, row.cfg != 1.0)
        if tokenizer is not None:
            flops += batch_size * vq_decode_flops(tokenizer, row.config)
        weights = sum(p.numel() for p in (*model.blocks.parameters(), *model.head.parameters()))
        weight_bytes = weights * row.steps * WEIGHT_BYTES.get(decoder.path, 2 if args.bf16 else 4)
        result: dict[str, Any] = {
            "row": row.name,
            "steps": row.steps,
            "batch_size": batch_size,
            "path": decoder.path,
            "pixels": tokenizer is not None,
            "warmup": warmup,
            "runs": latency.runs,
            "median_ms": 1000 * latency.median_s,
            "p10_ms": 1000 * latency.p10_s,
            "p90_ms": 1000 * latency.p90_s,
            "images_per_sec": latency.images_per_sec,
            "first_call_sec": first_call_sec,
            "weight_bytes_per_sec": weight_bytes / latency.median_s,
            "weight_bytes_share": weight_bytes / latency.median_s / self.limits["bytes_per_sec"],
            "flops_per_sec": flops / latency.median_s,
            "flops_share": flops / latency.median_s / self.limits["flops_per_sec"],
        }
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            result["peak_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
            result["device_memory_gib"] = (total - free) / 2**30  # with graphs and libraries
        else:
            result["peak_memory_gib"] = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            )  # of the process so far
        if row.name in EXPECTED:
            published = EXPECTED[row.name]
            figures = {"latency_ms": 1000 * published.latency_s, "images_per_sec": published.images_per_sec}
            result["published_a100"] = figures
        if args.profile is not None:
            name = f"{row.name}_{decoder.path}_batch{batch_size}{'' if tokenizer else '_tokens'}.txt"
            write_profile(decoder, args.profile / name.replace(", ", "_").replace(" ", "_"))
        self.results.append(result)
        self.save()


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


def measure_startup(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first images in two new processes that share an empty compile cache."""
    command = [sys.executable, "-m", "scripts.benchmark_latency", "--warmup", "0", "--runs", "1", "--paths", "auto"]
    command += ["--device", args.device, "--bf16" if args.bf16 else "--no-bf16", "--batch_sizes", "1"]
    command += ["--pixels", "yes"]
    if args.rows is not None:
        command += ["--rows", row.name]
    else:
        command += ["--model", args.model, "--img_size", str(args.img_size), "--cfg", str(args.cfg)]
        command += ["--generation_steps", str(args.generation_steps)]
    with tempfile.TemporaryDirectory() as cache:
        places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        seconds = []
        for _ in range(2):
            child = subprocess.run(command, env=os.environ | places, check=True, stdout=subprocess.PIPE, text=True)
            seconds.append(json.loads(child.stdout.splitlines()[-1])["results"][0]["first_call_sec"])
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
    args = build_parser().parse_args()
    device = resolve_device(args.device)
    cuda = device.type == "cuda"
    args.bf16 = cuda if args.bf16 is None else args.bf16
    args.warmup = (PUBLISHED_WARMUP if cuda else 1) if args.warmup is None else args.warmup
    args.runs = (PUBLISHED_RUNS if cuda else 5) if args.runs is None else args.runs
    args.paths = args.paths or (["plain", "compiled", "graph"] if cuda else ["plain", "auto"])
    if args.runs < 1 or args.warmup < 0 or min(args.batch_sizes) < 1:
        raise UserError("--runs and --batch_sizes must be at least 1, --warmup at least 0.")
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads is {args.threads}; it must be at least 1.")
        torch.set_num_threads(args.threads)
    rows = choose_rows(args)
    if args.pretrained_ckpt is not None and len(rows) > 1:
        raise UserError("--pretrained_ckpt is of one model; measure one of --rows with it.")
    for path in args.paths:
        resolve_path(path, device, torch.float32, args.bf16)
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    tokenizer = random_tokenizer() if args.vqgan_path is None else load_tokenizer(args.vqgan_path)
    tokenizer = tokenizer.to(device).eval()
    benchmark = Benchmark(args, device)
    with_pixels = {"both": (False, True), "yes": (True,), "no": (False,)}[args.pixels]
    for row in rows:
        torch.manual_seed(0)
        with torch.device(device):
            model = LPD(row.config).eval()
        if args.pretrained_ckpt is not None:
            load_weights(model, load_checkpoint(args.pretrained_ckpt)["model"], str(args.pretrained_ckpt))
        for batch_size, path, pixels in itertools.product(args.batch_sizes, args.paths, with_pixels):
            benchmark.measure(row, model, tokenizer if pixels else None, batch_size, path, args.runs)
        if args.one_by_one:
            for path in args.paths:
                benchmark.measure(row.one_by_one(), model, None, 1, path, max(1, args.runs // 50))
        del model
        if args.startup:
            benchmark.startup.append(measure_startup(row, args))
            benchmark.save()
    # Last, so that what it compiles does not shorten a start-up that is measured.
    benchmark.draw = measure_draw(device, tokenizer.config.codebook_size, Sampling(cfg=2.0))
    print_table(benchmark.results)
    benchmark.save()
    print(json.dumps(benchmark.output()))


if __name__ == "__main__":
    exit_on_user_error(main)
