"""torchrun whose workers get the time to save: stop signals go to the workers, and torchrun does not kill them.

torchrun by itself passes SIGTERM or Ctrl-C on and kills after 30 seconds what still runs, dies of SIGUSR1 and SIGUSR2,
ends all workers as soon as one has exited with another status than 0, and then exits with 1 whatever that status was.
Here it ignores these signals. Each worker (:mod:`scripts.cli.worker`) writes its process id to a file, so that it gets
signals from here, and its exit status to another; to torchrun it ends with 0 if a signal told it to exit. If this
process or torchrun is killed the workers die too, so that the output folder is free for the next start.

Started by launch.sh, with torchrun's arguments, then the training script and its flags:
    python -m scripts.cli.supervise --standalone --nproc_per_node 8 main_lpd.py --recipe lpd_l_256
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from util.signals import die_with_parent, exit_status

# Signals that ask the workers to save and exit, and what is sent to them. Slurm sends SIGUSR2 (set by submitit).
STOP_SIGNALS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
}
TOLD_TO_EXIT = tuple(map(exit_status, STOP_SIGNALS))  # exit statuses of workers that saved: 75, or 130 after Ctrl-C
STATUS_FOLDER = "LPD_STATUS_FOLDER"  # environment variable for the workers
PREFIX = "lpd_status_"  # of that folder's name
POLL_SECONDS = 0.2
# How long they may take to save and exit after the first signal. One that has been stopped, or hangs on a file system,
# would keep all others waiting; the job then ends without its last steps.
STOP_SECONDS = 600.0
# How long the others may take after the first worker has exited (rank 0, which writes the checkpoint, is the last).
EXIT_SECONDS = 300.0


class Workers:
    """The workers of this machine, known by their files in `folder`: `RANK.pid`, and `RANK.status` after the exit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signals: list[int] = []
        self._delivered: dict[str, int] = {}  # how many signals a worker has got so far

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(STOP_SIGNALS[signal.Signals(number)])

    def statuses(self) -> list[int]:
        """Exit statuses so far, in the order of the exits."""
        files = sorted(self.folder.glob("*.status"), key=lambda file: file.stat().st_mtime_ns)
        return [int(file.read_text()) for file in files]

    def send(self, number: int | None = None) -> None:
        """Send every worker the signals that it has not got yet, or the signal `number`."""
        for file in self.folder.glob("*.pid"):
            if file.with_suffix(".status").exists():
                continue
            pid, due = int(file.read_text()), self.signals[self._delivered.get(file.stem, 0) :]
            self._delivered[file.stem] = len(self.signals)
            for one in due if number is None else [number]:
                try:
                    os.kill(pid, one)
                except ProcessLookupError:
                    break  # it has ended


def ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _status_folder() -> Iterator[Path]:
    """A new folder, locked while this process lives; those of killed supervisors are removed."""
    for other in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # An error if it is in use, another user's, or has just been removed. A new one may not be locked yet.
        with contextlib.suppress(OSError), _locked(other, fcntl.LOCK_NB):
            if time.time() - other.stat().st_mtime > 60:
                shutil.rmtree(other)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks
            stack.enter_context(_locked(Path(name)))  # waits for another's look at whether it is in use
        yield Path(name)


@contextlib.contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(file)


def _become_torchrun() -> None:
    ignore_stop_signals()
    die_with_parent()


def supervise(arguments: list[str]) -> int:
    """Run torchrun with `arguments`; exit status 0, 75 (saved), 130 (Ctrl-C) or that of the first failure."""
    with _status_folder() as folder:
        workers = Workers(folder)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup is respected
                signal.signal(number, workers.on_signal)
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--signals-to-handle=SIGQUIT", *arguments],
            env=os.environ | {STATUS_FOLDER: str(folder)},
            start_new_session=True,  # so that the terminal's Ctrl-C does not reach it
            preexec_fn=_become_torchrun,
        )
        status, killed = _wait(torchrun, workers)
        statuses = workers.statuses()
    failures = [code for code in statuses if code not in (0, *TOLD_TO_EXIT)]
    told = [code for code in statuses if code in TOLD_TO_EXIT]
    if workers.signals and killed:  # the last checkpoint is what the job goes on from
        told.append(exit_status(workers.signals[0]))
    return failures[0] if failures else max(told, default=status)


def _wait(torchrun: subprocess.Popen[bytes], workers: Workers) -> tuple[int, bool]:
    """Pass signals on until torchrun ends; its exit status, and whether workers had to be killed.

    They are when they still run EXIT_SECONDS after the first has exited, or STOP_SECONDS after the first signal.
    """
    deadlines: dict[str, float] = {}
    killed = False
    while True:
        try:
            return torchrun.wait(POLL_SECONDS), killed
        except subprocess.TimeoutExpired:
            workers.send()
        now = time.monotonic()
        if workers.signals:
            deadlines.setdefault(f"{STOP_SECONDS:.0f} s after the first signal", now + STOP_SECONDS)
        if any(code in TOLD_TO_EXIT for code in workers.statuses()):
            deadlines.setdefault(f"{EXIT_SECONDS:.0f} s after the first exited", now + EXIT_SECONDS)
        for late, deadline in deadlines.items():
            if now > deadline and not killed:
                killed = True
                print(f"a worker still runs {late}: killing it", file=sys.stderr)
                workers.send(signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
