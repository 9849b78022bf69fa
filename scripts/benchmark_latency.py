"""Wall-clock time of generation: decode paths, batch sizes and one-by-one decoding compared in one run.

    python -m scripts.benchmark_latency --rows all --one_by_one --startup --output RESULTS.json
    python -m scripts.benchmark_latency --model lpd_l --img_size 256 --generation_steps 20 --device cpu --threads 2

Rows are named like the published evaluations. Weights are random where no checkpoint is given; the time is the same.
Prints a table and, as the last line, everything as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.decoder import DECODE_PATHS, Decoder, resolve_path
from engine.eval_outputs import describe_environment
from engine.generate import Sampling
from engine.latency import PUBLISHED_RUNS, PUBLISHED_WARMUP, measure_latency, synchronize
from engine.recipes import EVAL_RECIPES, EXPECTED
from models import MODEL_SIZES, model_config
from models.flops import decoding_flops
from models.lpd import LPD, LPDConfig, load_weights
from models.sampling import exponential_noise
from orders import group_sizes
from tokenizers import VQConfig, VQModel, load_tokenizer
from util.checkpoint import load_checkpoint
from util.dist import Dist, resolve_device
from util.errors import UserError, exit_on_user_error
from util.files import write_json
from util.help import HelpFormatter

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
    add("--one_by_one", action="store_true", help="decode one token at a time as well, at batch 1")
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


def median_sec(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    seconds = []
    run()
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device does at its best: bytes read and written per second by a copy, FLOP/s of a matrix product."""
    cuda = device.type == "cuda"
    source = torch.empty((2**31 if cuda else 2**28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return {
        "bytes_per_sec": 2 * len(source) / median_sec(lambda: target.copy_(source), device, 10),
        "flops_per_sec": 2 * side**3 / median_sec(lambda: a @ b, device, 10),
    }


def measure_noise(device: torch.device, vocab_size: int) -> dict[str, float]:
    """The draw's noise of 64 images × 20 tokens, ours by (seed, position) against torch's own generator."""
    batch, tokens = (64, 20) if device.type == "cuda" else (1, 20)
    seeds, positions = torch.arange(batch, device=device), torch.arange(tokens, device=device).repeat(batch, 1)
    noise: Callable[..., torch.Tensor] = exponential_noise
    if device.type == "cuda":
        noise = torch.compile(exponential_noise)  # as the compiled and graph paths run it
    buffer = torch.empty(batch, tokens, vocab_size, device=device)
    return {
        "per_image_sec": median_sec(lambda: noise(seeds, positions, vocab_size), device, 20),
        "torch_exponential_sec": median_sec(lambda: buffer.exponential_(), device, 20),
    }


def vq_decode_flops(tokenizer: VQModel, config: LPDConfig) -> int:
    """FLOPs of decoding the codes of one image."""
    with torch.device("meta"):
        twin = VQModel(tokenizer.config)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            twin.decode(torch.zeros(1, config.num_tokens, dtype=torch.int64))
    return counter.get_total_flops()


def measure(
    row: Row, model: LPD, tokenizer: VQModel | None, batch_size: int, path: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Time one decoder; `startup_sec` is from the first line to the first images."""
    device = model.pos_embed.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    decoder = Decoder(
        model, row.group_sizes, Sampling(row.cfg), batch_size, tokenizer=tokenizer, path=path, bf16=args.bf16
    )
    measure_latency(decoder, 0, 1)
    startup_sec = time.perf_counter() - start
    latency = measure_latency(decoder, args.warmup, args.runs, progress=f"{row.name}, {path}, batch {batch_size}")
    guided = row.cfg != 1.0
    flops = batch_size * decoding_flops(row.config, row.group_sizes, guided)
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
        "runs": latency.runs,
        "median_ms": 1000 * latency.median_s,
        "p10_ms": 1000 * latency.p10_s,
        "p90_ms": 1000 * latency.p90_s,
        "images_per_sec": latency.images_per_sec,
        "startup_sec": startup_sec,
        "weight_bytes_per_sec": weight_bytes / latency.median_s,
        "flops_per_sec": flops / latency.median_s,
    }
    if device.type == "cuda":
        result["peak_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    if args.profile is not None:
        name = f"{row.name}_{decoder.path}_batch{batch_size}{'' if tokenizer else '_tokens'}.txt".replace(", ", "_")
        write_profile(decoder, args.profile / name.replace(" ", "_"))
    return result


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
            seconds.append(json.loads(child.stdout.splitlines()[-1])["results"][0]["startup_sec"])
    return {"row": row.name, "cold_sec": seconds[0], "warm_sec": seconds[1]}


def print_table(results: list[dict[str, Any]], limits: dict[str, float]) -> None:
    heads = ("median ms", "p10", "p90", "images/s", "bytes/s", "FLOP/s", "GiB", "start s")
    print(f"\n{'row':42} {'path':>14} {'batch':>5} {'pixels':>6}", *(f"{head:>9}" for head in heads))
    for r in results:
        figures = [r["median_ms"], r["p10_ms"], r["p90_ms"], r["images_per_sec"]]
        shares = [r["weight_bytes_per_sec"] / limits["bytes_per_sec"], r["flops_per_sec"] / limits["flops_per_sec"]]
        print(
            f"{r['row']:42} {r['path']:>14} {r['batch_size']:5} {'yes' if r['pixels'] else 'no':>6}",
            *(f"{figure:9.2f}" for figure in figures),
            *(f"{share:9.1%}" for share in shares),
            f"{r['peak_memory_gib']:9.2f}" if "peak_memory_gib" in r else f"{'–':>9}",
            f"{r['startup_sec']:9.1f}",
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
    tokenizer = VQModel(VQConfig()) if args.vqgan_path is None else load_tokenizer(args.vqgan_path)
    tokenizer = tokenizer.to(device).eval()
    results, startup = [], []
    for row in rows:
        torch.manual_seed(0)
        with torch.device(device):
            model = LPD(row.config).eval()
        if args.pretrained_ckpt is not None:
            load_weights(model, load_checkpoint(args.pretrained_ckpt)["model"], str(args.pretrained_ckpt))
        cases = list(itertools.product([row], args.batch_sizes, args.paths))
        if args.one_by_one:
            cases += [(row.one_by_one(), 1, path) for path in args.paths]
        for case, batch_size, path in cases:
            for with_pixels in {"both": (False, True), "yes": (True,), "no": (False,)}[args.pixels]:
                result = measure(case, model, tokenizer if with_pixels else None, batch_size, path, args)
                if row.name in EXPECTED and case is row:
                    result["published_a100"] = {
                        "latency_ms": 1000 * EXPECTED[row.name].latency_s,
                        "images_per_sec": EXPECTED[row.name].images_per_sec,
                    }
                results.append(result)
                if args.output is not None:
                    write_json(args.output.with_suffix(".partial.json"), results)
        del model
        if args.startup:
            startup.append(measure_startup(row, args))
    # Last, so that compiling the noise does not shorten a start-up that was measured.
    limits = measure_limits(device, torch.bfloat16 if args.bf16 else torch.float32)
    noise = measure_noise(device, tokenizer.config.codebook_size)
    print_table(results, limits)
    output = {
        "environment": describe_environment(Dist(0, 1, device)),
        "bf16": args.bf16,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "limits": limits,
        "noise": noise,
        "results": results,
        "startup": startup,
    }
    if args.output is not None:
        write_json(args.output, output)
        args.output.with_suffix(".partial.json").unlink(missing_ok=True)
    print(json.dumps(output))


if __name__ == "__main__":
    exit_on_user_error(main)
