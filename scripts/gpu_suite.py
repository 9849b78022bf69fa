"""Everything that is measured on a GPU, by one command, in order of worth: tests, then every benchmark of the README.

    python -m scripts.gpu_suite --output_dir runs/gpu --quick --time_limit 540    # again, until it ends with status 0
    python -m scripts.gpu_suite --output_dir runs/gpu --publish h200              # into benchmarks/results/, the README

The paper's protocol, without --quick, has parts of twenty minutes: it needs a larger --time_limit, or none. Each part
is an ordinary command; its result is in --output_dir as soon as it ends, its output in logs/. What is finished is not
done again unless its result is deleted; a part that fails is named in summary.json, the others go on, and the next call
tries it last. Exit status: 0 all done; 1 a part failed; 75 the time limit came, run the same command again. Without a
GPU tiny models run for two minutes, and what needs a GPU is left out.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.recipes import EVAL_RECIPES
from engine.training.stop import exit_when_told
from experiments.reports import NAME
from scripts.gpu_tables import publish
from scripts.stages import OutOfTime, Stages
from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, setting
from util.dist import DeviceConfig, resolve_device
from util.errors import UserError, reading
from util.files import check_output_dir, write_json
from util.folder_lock import FolderLock
from util.readers import read_json
from util.signals import REQUEUE_STATUS, die_with_parent

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("tests", "latency", "kernels", "tiles", "orders", "train", "evaluation", "photos")
FIRST_ROW = "lpd_l_res256_steps20"
QUICK = ("--warmup", "20", "--runs", "50", "--batch_runs", "10")
OVERRUN_S = 20.0  # that a part may go on after the time limit
STOP_S = 20.0  # that a stopped part has to end by itself
LOG_LINES = 15  # of a failed part, kept in the summary


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(DeviceConfig):
    """What is measured, and how long that may take."""

    output_dir: Path = setting(Path("runs/gpu"), "results, logs and compiled kernels")
    time_limit: float | None = setting(
        None, f"seconds; what would not fit is not begun, what runs {OVERRUN_S:.0f} s over is stopped", above=0
    )
    quick: bool = setting(False, "20 warm-up and 50 measured runs, 10 of batches, in place of the paper's 100 and 500")
    tiny: bool = setting(False, "tiny models, few runs: only see that everything runs; always so without a GPU")
    parts: tuple[str, ...] = setting(GROUPS, "only these", choices=GROUPS)
    inception_path: Path | None = setting(None, "Inception weights, for the evaluation (default: in torch's hub cache)")
    photos: Path | None = setting(None, "the experiment on these photographs too, see experiments.cifar10.run --data")
    produce: Path | None = setting(None, "that on fruit and vegetables too, see experiments.produce.data")
    publish: str | None = setting(None, "run nothing: copy results to benchmarks/results/*_NAME.json, fill the README")

    def __post_init__(self) -> None:
        check(self)
        if self.publish is not None and NAME.fullmatch(self.publish) is None:
            raise UserError(f"--publish {self.publish!r} must be letters, digits, '-' and '_'.")
        for flag, path in (("inception_path", self.inception_path), ("photos", self.photos), ("produce", self.produce)):
            if path is not None and not path.exists():
                raise UserError(f"--{flag} {path} does not exist.")


@dataclass(frozen=True)
class Part:
    """A command of the suite."""

    group: str
    name: str
    words: tuple[str, ...]  # after `python`
    seconds: float  # about how long it takes on an H200
    result: Path  # JSON that the command writes; of the tests pytest's XML, which becomes JSON beside it
    resumable: bool = False  # takes --time_limit and ends with 75 where work is left

    def command(self, out: Path) -> str:
        """As it is recorded: with DIR for the output folder, which may be moved."""
        return shlex.join(["python", *self.words]).replace(str(out), "DIR")


class Parts:
    """The parts of a suite, each one line or two: group, name, seconds on an H200, flags of the benchmark."""

    def __init__(self, config: SuiteConfig, out: Path, cuda: bool) -> None:
        self.config, self.out, self.cuda = config, out, cuda
        self.device = ("--device", config.device)

    def __call__(self) -> list[Part]:
        """Those of the groups asked for, in order of worth."""
        tiny = self.config.tiny or not self.cuda
        parts = [*(self._tests() if self.cuda else []), *(self._tiny() if tiny else self._full())]
        if self.config.produce is not None:
            parts.append(self._photos("produce", self.config.produce, "tiny" if tiny else "gpu"))
        if self.config.photos is not None:
            parts.append(self._photos("cifar10", self.config.photos, "tiny" if tiny else "full"))
        return [part for part in parts if part.group in self.config.parts]

    def _benchmark(self, group: str, name: str, seconds: float, *flags: str | Path, module: str = "") -> Part:
        result = self.out / f"{name}.json"
        module = module or f"benchmark_{group}"
        words = ("-m", f"scripts.{module}", *map(str, flags), *self.device, "--output", str(result))
        return Part(group, name, words, seconds, result)

    def _tests(self) -> list[Part]:
        junit = self.out / "tests.xml"
        words = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", "tests")
        return [Part("tests", "tests", words, 180, junit)]

    def _full(self) -> list[Part]:
        quick, part = self.config.quick, self._benchmark
        runs, slow = (QUICK, 1) if quick else ((), 8)
        first = ("--rows", FIRST_ROW, "--batch_sizes", "1")
        # A part of its own: a profiler that has run may slow down what is measured after it.
        listed = (*first, "--paths", "graph", "--outputs", "pixels", "--warmup", "2", "--runs", "2")
        pixels = ("--paths", "graph", "--outputs", "pixels", *runs)
        rows = {row: 60 if "256" in row else 90 for row in EVAL_RECIPES}
        path = self.config.inception_path
        inception = () if path is None else ("--inception_path", path.resolve())
        return [
            part("latency", "latency_by_path", 140 * slow, *first, *runs),
            part("kernels", "kernels", 40, *listed, "--profile", self.out / "kernels", module="benchmark_latency"),
            part("tiles", "tiles", 150, module="tune_kernels"),
            *(part("latency", f"latency_{row}", sec * slow, "--rows", row, *pixels) for row, sec in rows.items()),
            part("orders", "orders", 60, *(("--num", "20000") if quick else ())),
            part("train", "train", 150, *(("--steps", "20") if quick else ())),
            part("evaluation", "evaluation", 90, *inception),
        ]

    def _tiny(self) -> list[Part]:
        part, model = self._benchmark, ("--model", "lpd_debug", "--img_size", "64")
        steps, runs = (*model, "--generation_steps", "5"), ("--warmup", "1", "--runs", "2")
        listed = (*steps, "--batch_sizes", "1", "--paths", "auto", *runs, "--profile", self.out / "kernels")
        few = ("--num_images", "8", "--eval_bsz", "4", "--arch", "test_resnet")
        return [
            part("latency", "latency_by_path", 15, *steps, "--batch_sizes", "1", "2", *runs),
            part("kernels", "kernels", 15, *listed, module="benchmark_latency"),
            *([part("tiles", "tiles", 30, "--model", "lpd_tiny", module="tune_kernels")] if self.cuda else []),
            part("orders", "orders", 15, "--num", "100"),
            part("train", "train", 15, *model, "--batch_size", "2", "--steps", "2", "--cache_images", "20"),
            part("evaluation", "evaluation", 20, *steps, *few),
        ]

    def _photos(self, experiment: str, photos: Path, scale: str) -> Part:
        folder = self.out / experiment
        data = ("--data", str(photos.resolve()), "--output_dir", str(folder), "--scale", scale)
        words = ("-m", f"experiments.{experiment}.run", *data, *self.device)
        return Part("photos", experiment, words, 60, folder / "report" / f"{experiment}.json", resumable=True)


class PartFailed(Exception):
    """A part ended with an error; the message holds the last lines that it printed."""


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process that leads a group, and all of the group, to end, and make them."""
    deadline = time.monotonic() + STOP_S
    with contextlib.suppress(ProcessLookupError):  # none of the group is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path) -> str:
    # A progress bar's states are lines too.
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LOG_LINES:])


def junit_counts(junit: Path) -> dict[str, Any]:
    """What pytest's XML says: how many passed, failed and were skipped, and the failures' first lines."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[dict[str, str]] = []
    suite = next(ET.parse(junit).iter("testsuite"))
    for case in suite.iter("testcase"):
        problems = [element for element in case if element.tag in ("failure", "error")]
        state = "failed" if problems else "skipped" if case.find("skipped") is not None else "passed"
        counts[state] += 1
        name = f"{case.get('classname')}::{case.get('name')}"
        failures += [{"test": name, "message": problem.get("message", "")[:1000]} for problem in problems]
    return {**counts, "seconds": float(suite.get("time", 0)), "failures": failures}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cuda = device.type == "cuda"
    driver = triton = None
    if cuda:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = None
        triton = importlib.import_module("triton").__version__  # only wheels for GPUs bring it
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "driver": driver,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "triton": triton,
    }


def revision(root: Path) -> str | None:
    """The commit of a working tree, with "-dirty" if there are changes besides; None without git."""
    git = ("git", "-C", str(root))
    try:
        head, changes = (
            subprocess.run((*git, *words), capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changes else head


class Suite:
    """The parts of one output folder and what became of them (``summary.json``)."""

    def __init__(self, parts: Sequence[Part], out: Path, config: SuiteConfig, conditions: dict[str, Any]) -> None:
        self.parts, self.out = parts, out
        self.scale = {"tiny": config.tiny or conditions["device"] == "CPU", "quick": config.quick}
        self.stages = Stages(out, config.time_limit)
        self.path = out / "summary.json"
        self.summary = self._read_summary() if self.path.exists() else {"parts": {}}
        for key in ("device", "torch", "triton"):
            if self.summary.get(key, conditions[key]) != conditions[key]:
                raise UserError(
                    f"{out} holds results of {key} {self.summary[key]}, this is {conditions[key]}; give another "
                    "--output_dir."
                )
        self.summary |= conditions
        cache = out / "cache"
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
        # Later parts find what earlier ones compiled; and a log has what was printed in its order.
        self.environment = os.environ | caches | {"PYTHONUNBUFFERED": "1"}

    def _read_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = read_json("summary", self.path)
        with reading("summary", self.path):
            for name, part in summary["parts"].items():
                kinds = {"command": str, "state": str, "revision": str | None}
                if not all(isinstance(part[key], kind) for key, kind in kinds.items()):
                    raise ValueError(f"the part {name!r}")
        return summary

    def run(self) -> int:
        """Run what is not finished; gives the exit status."""
        self._name_revisions()
        left_over, begun = [], False
        for part in sorted(self.parts, key=lambda part: self._state(part) == "failed"):
            left = self.stages.left()
            if left is not None and part.seconds > left and self._state(part) != "finished":
                print(f"== {part.name}: takes about {part.seconds:.0f} s, {left:.0f} s are left", flush=True)
                left_over.append(part)
                continue
            # One that failed may do so again at every call.
            begun = begun or self._state(part) not in ("finished", "failed")
            try:
                self._note(part, "not finished")
                deleted = not self._result(part).exists()
                self.stages.run(part.name, partial(self._run, part), part.command(self.out), always=deleted)
                self._note(part, "finished")
            except PartFailed as error:
                print(f"== {part.name}: failed\n{error}", flush=True)
                self._note(part, "failed", str(error))
            except OutOfTime as reason:
                print(f"== {part.name}: {reason}", flush=True)
                left_over.append(part)
                begun = True
        if left_over and not begun:
            shortest = min(part.seconds for part in left_over)
            raise UserError(f"no part fits into --time_limit; the shortest that is left takes about {shortest:.0f} s.")
        return REQUEUE_STATUS if left_over else int(any(self._state(part) == "failed" for part in self.parts))

    def _name_revisions(self) -> None:
        """Say which finished parts are of another state of the code."""
        now = revision(ROOT)
        for part in self.parts:
            measured = self.summary["parts"][part.name]["revision"] if self._state(part) == "finished" else now
            if measured != now:
                made = self.out / self._result(part).relative_to(self.out).parts[0]
                print(
                    f"== {part.name}: was measured at {measured or 'an unknown revision'}, this is {now or 'unknown'}; "
                    f"delete {made} or give another --output_dir to measure it again",
                    flush=True,
                )

    def _result(self, part: Part) -> Path:
        return part.result.with_suffix(".json")

    def _state(self, part: Part) -> str | None:
        entry = self.summary["parts"].get(part.name, {})
        if entry.get("command") != part.command(self.out):
            return None
        return "not finished" if entry["state"] == "finished" and not self._result(part).exists() else entry["state"]

    def _note(self, part: Part, state: str, error: str | None = None) -> None:
        """Save what became of a part. One that finished before keeps its entry."""
        if self._state(part) == "finished":
            return
        command = part.command(self.out)
        stage = self.stages.states().get(part.name, {})
        self.summary["parts"][part.name] = {
            "group": part.group,
            "command": command,
            **self.scale,
            "state": state,
            "seconds": stage.get("seconds") if stage.get("command") == command else None,
            "date": datetime.date.today().isoformat(),
            "revision": revision(ROOT),
            "result": str(self._result(part).relative_to(self.out)),
            "error": error,
        }
        write_json(self.path, self.summary)

    def _run(self, part: Part) -> None:
        """Run a part's command; raises PartFailed, or OutOfTime if it was stopped or has work left."""
        left, log = self.stages.left(), self.out / "logs" / f"{part.name}.log"
        limited = part.resumable and left is not None
        words = (*part.words, "--time_limit", f"{left:.0f}") if limited else part.words
        log.parent.mkdir(exist_ok=True)
        if not part.resumable:
            part.result.unlink(missing_ok=True)
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            try:
                status = process.wait(None if left is None else left + OVERRUN_S)
            except subprocess.TimeoutExpired:
                end(process)
                raise OutOfTime(f"stopped {OVERRUN_S:.0f} s after the time limit") from None
            except BaseException:
                end(process)
                raise
        if part.group == "tests" and part.result.exists():
            counts = junit_counts(part.result)
            write_json(self._result(part), counts)
            print(", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped")), flush=True)
        if part.resumable and status == REQUEUE_STATUS:
            raise OutOfTime("work is left")
        if status:
            raise PartFailed(f"status {status}\n{last_lines(log)}")


def main() -> None:
    parser = Parser(prog="python -m scripts.gpu_suite", description=__doc__)
    parser.add_config(SuiteConfig)
    config = from_args(SuiteConfig, parser.parse_args())
    if config.publish is not None:
        return publish(config.output_dir, config.publish, ROOT)
    check_output_dir(config.output_dir)
    out, device = config.output_dir.resolve(), resolve_device(config.device)
    cuda = device.type == "cuda"
    with FolderLock(out) as lock:
        lock.acquire()
        suite = Suite(Parts(config, out, cuda)(), out, config, machine(device))
        if not cuda:
            print("no GPU: tiny models, whose figures mean nothing; the GPU tests and the published rows are left out")
        with exit_when_told():
            status = suite.run()
    print(f"\nsummary: {suite.path}", flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    exit_on_user_error(main)
