"""One command in a process of its own, forked from one that has imported everything: a start costs milliseconds."""

from __future__ import annotations

import contextlib
import enum
import os
import re
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.commands import run

LIMIT_S = 60.0  # of a case; an undisturbed one takes about a second of a core's time
MEMORY = 6 * 2**30  # bytes of address space that a case may have beyond those of this process
_WARNING = re.compile(r"^(\d\d:\d\d:\d\d (\[rank \d+\] )?[WE] |warning: )", re.MULTILINE)

_CURSOR = re.compile(r"\x1b\[\w")  # what progress bars move it by; they leave blanks, too


class Kind(enum.Enum):
    """What a case came to. The last three are failures."""

    RIGHT = "right result"
    REFUSED = "one sentence"
    FALLBACK = "fallback with a warning"
    OTHER = "other valid content"  # of a file from outside that has no checksum: it is read as what it says
    TRACEBACK = "TRACEBACK"
    HANG = "HANG"
    WRONG = "SILENTLY WRONG"

    @property
    def failed(self) -> bool:
        return self in (Kind.TRACEBACK, Kind.HANG, Kind.WRONG)


@dataclass(frozen=True)
class Ended:
    """How a command ended: `status` is None if it had to be killed; a negative one is a signal's number."""

    status: int | None
    out: str
    err: str
    seconds: float

    @property
    def warned(self) -> bool:
        return _WARNING.search(self.err) is not None

    @property
    def refusals(self) -> list[str]:
        lines = (line.lstrip() for line in _CURSOR.sub("", self.err).splitlines())
        return [line for line in lines if line.startswith("error: ")]


@dataclass(frozen=True)
class Outcome:
    """A case: what it was, what it came to, and what was said or seen."""

    group: str
    case: str
    kind: Kind
    said: str


def judge(ended: Ended, right: Callable[[], bool], free: bool = False) -> tuple[Kind, str]:
    """What an ended command came to.

    Args:
        right: whether its results are those of the undisturbed command; asked only where it ended well.
        free: its input has no checksum: other results may be those of another valid file.
    """
    last = (ended.err.strip().splitlines() or [""])[-1][:300]
    if ended.status is None:
        return Kind.HANG, last
    if "Traceback (most recent call last)" in ended.err or ended.status not in (0, 1, 2):
        return Kind.TRACEBACK, f"status {ended.status}: {last}"
    if ended.status != 0:
        told = len(ended.refusals) == 1
        return (Kind.REFUSED, ended.refusals[0]) if told else (Kind.TRACEBACK, f"status {ended.status}: {last}")
    if right():
        return Kind.RIGHT, ""
    if ended.warned:
        return Kind.FALLBACK, last
    return (Kind.OTHER if free else Kind.WRONG), last


class Running:
    """A command that was started; `pid` leads a process group of its own."""

    def __init__(self, main: Callable[[], None], arguments: Sequence[object], folder: Path) -> None:
        self._logs = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        self._start = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(main, arguments, folder, self._logs)
        self._file = os.pidfd_open(self.pid)

    def ended(self, wait_s: float) -> bool:
        return bool(select.select([self._file], [], [], wait_s)[0])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def result(self, limit_s: float = LIMIT_S) -> Ended:
        """Wait for the end; kill it after the limit."""
        in_time = self.ended(limit_s)
        self.kill()  # also what it may have left behind
        _, status = os.waitpid(self.pid, 0)
        os.close(self._file)
        seconds = time.monotonic() - self._start
        out, err = (log.read_text(errors="replace") if log.exists() else "" for log in self._logs)
        for log in self._logs:
            log.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(status) if in_time else None, out, err, seconds)


def call(main: Callable[[], None], arguments: Sequence[object], folder: Path, limit_s: float = LIMIT_S) -> Ended:
    """Run a command to its end, in `folder`."""
    return Running(main, arguments, folder).result(limit_s)


def compute(function: Callable[[], None], folder: Path) -> None:
    """Call a function in a process of its own, so that this one starts no threads; raises if it fails."""
    ended = call(function, (), folder)
    if ended.status != 0:
        raise RuntimeError(f"{function} ended with status {ended.status}:\n{ended.err}")


def _become(main: Callable[[], None], arguments: Sequence[object], folder: Path, logs: list[Path]) -> None:
    status = 70
    try:
        os.setpgid(0, 0)
        for number, log in enumerate(logs, start=1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        status = run(main, *arguments)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value, for commands that are started meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
