"""Disturbances from outside: kills, two starts at once, full disks, folders that can't be written, links."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.commands import COMMANDS, Command
from tests.faults.files import DamagedFiles
from tests.faults.worker import LIMIT_S, Ended, Kind, Outcome, Running, call, judge
from tests.helpers.commands import ROOT
from tests.helpers.slurm_cluster import wait_until
from tests.helpers.tiny_run import flags, make_cache

WRITERS = tuple(command for command in COMMANDS.values() if "OUT" in command.arguments and not command.measures)
TWICE = (
    *("train", "evaluate", "cache", "tokenizers.train", "hub export", "compare", "likelihood", "find_schedule"),
    *("classifier", "generate", "produce.run", "produce.data"),
)
TINY_DISK = 48 * 2**10  # bytes: too few for any of them
STOP_S = 20.0  # what the stopped rank's supervisor is given here instead of its minutes


class Disturbances:
    """The cases; what is right is what the undisturbed commands make."""

    def __init__(self, undisturbed: DamagedFiles, scratch: Path) -> None:
        self.undisturbed, self.inputs, self.scratch = undisturbed, undisturbed.inputs, scratch / "disturbed"
        self.scratch.mkdir(parents=True)

    def _new(self) -> Path:
        out = self.scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def _judge(self, group: str, case: str, command: Command, out: Path, ended: Ended) -> Outcome:
        """A command that has to have ended well, with the right results and nothing left over."""

        def right() -> bool:
            left = [path.name for path in out.rglob(".*") if path.suffix in (".tmp", ".lock")]
            return not left and command.result(out, ended.out) == self.undisturbed.right(command)

        try:
            kind, said = judge(ended, right)
        except Exception as error:  # results that can't be read
            kind, said = Kind.WRONG, f"{type(error).__name__}: {error}"
        return Outcome(group, case, Kind.WRONG if kind == Kind.REFUSED else kind, said)

    def kill(self, command: Command, turn: int) -> Outcome:
        """Kill it at a random moment, or twice, and start it again."""
        rng, out = random.Random(f"{command.name} {turn}"), self._new()
        life = call(command.main, command.words(out), self.inputs).seconds
        out = self._new()
        for _ in range(1 + turn % 2):
            running = Running(command.main, command.words(out), self.inputs)
            running.ended(rng.uniform(0, life))
            running.kill()
            running.result()
        ended = call(command.main, command.words(out), self.inputs)
        return self._judge("kill -9, then the same command", f"{command.name} ({turn})", command, out, ended)

    def start_twice(self, command: Command, turn: int) -> Outcome:
        """Both may end well if one comes after the other; else one is refused; the results are right."""
        out, pause = self._new(), random.Random(turn).uniform(0, 0.1)
        first = Running(command.main, command.words(out), self.inputs)
        first.ended(pause)
        second = Running(command.main, command.words(out), self.inputs)
        ends = [running.result() for running in (first, second)]
        group, case = "two starts at once", f"{command.name} ({turn})"
        bad = [judge(ended, lambda: True) for ended in ends]
        for kind, said in bad:
            if kind.failed:
                return Outcome(group, case, kind, said)
        good = [ended for ended in ends if ended.status == 0]
        if not good:
            return Outcome(group, case, Kind.WRONG, "both were refused")
        return self._judge(group, case, command, out, good[0])

    def full_disk(self, command: Command, turn: int) -> Outcome:
        """A file system with little room; then with enough."""
        out, group = self._new(), "full disk, then the same command with room"
        size = random.Random(f"{command.name} {turn}").randrange(4096, TINY_DISK)
        with _file_system(out, size):
            ended = call(command.main, command.words(out / "run"), self.inputs)
            kind, said = judge(ended, lambda: True)
            if kind.failed or (ended.status == 0 and size < 8192 and kind != Kind.FALLBACK and _large(command)):
                failed = kind if kind.failed else Kind.WRONG
                return Outcome(group, f"{command.name}, {size} bytes", failed, said)
            subprocess.run(["mount", "-o", f"remount,size={2**28}", str(out)], check=True)
            ended = call(command.main, command.words(out / "run"), self.inputs)
            return self._judge(group, f"{command.name}, {size} bytes", command, out / "run", ended)

    def unwritable(self, command: Command) -> Outcome:
        """A file system that can only be read: found before work starts."""
        out = self._new()
        with _file_system(out, 2**20):
            subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True)
            ended = call(command.main, command.words(out / "run"), self.inputs)
        kind, said = judge(ended, lambda: False)
        if kind == Kind.REFUSED and ended.status != 2:
            kind = Kind.WRONG  # not before work started
        return Outcome("read-only file system", command.name, kind, said)

    def link(self, command: Command, name: str) -> Outcome:
        """A link to a folder, or to a file, of someone else's in the place of what the command keeps there."""
        out, other = self._new(), self.scratch / "others"
        shutil.rmtree(other, ignore_errors=True)
        (other / "folder").mkdir(parents=True)
        (other / "folder" / "000000.png").write_bytes(b"precious")
        (other / "file").write_bytes(b"precious")
        out.mkdir()
        (out / name).symlink_to(other / ("file" if name == ".lock" else "folder"))
        ended = call(command.main, command.words(out), self.inputs)
        kept = [path.read_bytes() for path in (other / "folder" / "000000.png", other / "file") if path.exists()]
        alone = sorted(path.name for path in other.rglob("*")) == ["000000.png", "file", "folder"]
        kind, said = judge(ended, lambda: alone)
        if kept != [b"precious"] * 2 or not alone:
            kind, said = Kind.WRONG, "what the link led to was changed"
        return Outcome("links that lead elsewhere", f"{command.name}: {name}", kind, said)

    def stopped_rank(self) -> Outcome:
        """One of two processes hangs; SIGTERM to the launcher ends the job all the same, resumable."""
        out, cache = self._new(), self.scratch / "codes"
        if not cache.exists():
            make_cache(cache)
        code = f"import scripts.cli.supervise as s, sys; s.STOP_SECONDS = {STOP_S}; sys.exit(s.supervise(sys.argv[1:]))"
        torchrun = ["--standalone", "--nproc_per_node", "2", "-m", "scripts.cli.worker", "main_lpd.py"]
        command = [sys.executable, "-c", code, *torchrun, *flags(cache, out, epochs=100_000)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_until((out / "metrics.jsonl").exists, 120, "the first step of two processes")
                ranks = _descendants(process.pid, out)
                os.kill(max(ranks), signal.SIGSTOP)
                start = time.monotonic()
                process.terminate()
                status: int | None = process.wait(STOP_S + LIMIT_S)
                took = f"status {status} after {time.monotonic() - start:.0f} s"
                left = [pid for pid in ranks if Path("/proc", str(pid)).exists()]
            except subprocess.TimeoutExpired:
                status, took, left = None, "still running", []
                for pid in (process.pid, *ranks):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        kind = Kind.HANG if status is None or left else Kind.RIGHT if status == 75 else Kind.WRONG
        return Outcome("a stopped rank, then SIGTERM", "train on two processes", kind, took)

    def cases(self, turns: int) -> Iterator[tuple[Callable[..., Outcome], tuple[Any, ...]]]:
        """Functions and their arguments, each of which makes an outcome."""
        for command in WRITERS:
            for turn in range(turns):
                yield self.kill, (command, turn)
        for name in TWICE:
            for turn in range(turns):
                yield self.start_twice, (COMMANDS[name], turn)
        if may_mount():
            for command in WRITERS:
                yield self.unwritable, (command,)
                for turn in range(min(turns, 2)):
                    yield self.full_disk, (command, turn)
        for name, link in (
            *((name, ".lock") for name in ("train", "evaluate", "cache", "tokenizers.train")),
            ("cache", ".parts"), ("evaluate", "images"), ("train", "samples"),
        ):  # fmt: skip
            yield self.link, (COMMANDS[name], link)
        yield self.stopped_rank, ()


def may_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None and _try_mount()


def _try_mount() -> bool:
    folder = Path("/tmp") / f"may_mount_{os.getpid()}"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", str(folder)], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
        return done.returncode == 0
    finally:
        folder.rmdir()


@contextlib.contextmanager
def _file_system(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _large(command: Command) -> bool:
    """Whether what it writes is larger than a page or two."""
    return command.name in ("train", "evaluate", "tokenizers.train", "classifier", "hub export")


def _descendants(pid: int, out: Path) -> list[int]:
    """Processes of main_lpd.py below one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            todo.append(child)
            with contextlib.suppress(OSError):
                words = Path("/proc", str(child), "cmdline").read_bytes().split(b"\0")
                if (
                    str(out).encode() in words
                    and b"scripts.cli.worker" in words
                    and b"torch.distributed.run" not in words
                ):
                    found.append(child)
    return found
