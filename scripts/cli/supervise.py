"""torchrun with a gentle end: stop signals go to the workers, which save and leave; nobody is killed meanwhile.

torchrun by itself answers SIGTERM or Ctrl-C by passing it on and killing after 30 seconds what still runs, dies of
SIGUSR1 and SIGUSR2, ends all workers as soon as one has left with a status, and then exits with 1 whatever that was.
Here it ignores these signals; each worker (:mod:`scripts.cli.worker`) leaves its process id, so that it can be
signalled directly, and its status, and looks successful to torchrun when it left because it was told to.

Started by launch.sh, with torchrun's arguments, the training script and its flags behind it:
    python -m scripts.cli.supervise --standalone --nproc_per_node 8 main_lpd.py --recipe lpd_l_256
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

# Signals that ask the workers to save and leave, and what is sent to them. USR2 is Slurm's through submitit.
STOP_SIGNALS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
}
REQUEUE, INTERRUPTED = 75, 130  # EX_TEMPFAIL: saved, start me again; Ctrl-C
TOLD_TO_LEAVE = (REQUEUE, INTERRUPTED)
STATUS_FOLDER = "LPD_STATUS_FOLDER"  # environment variable for the workers
POLL_SECONDS = 0.2
# After one worker has left, how long the others may take (the writer of a large checkpoint is the last).
LEAVE_SECONDS = 300.0


class Workers:
    """The local workers as their files in `folder` tell: `RANK.pid`, and `RANK.status` once one has left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signals: list[int] = []
        self._delivered: dict[str, int] = {}  # signals that a worker has got so far

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(STOP_SIGNALS[signal.Signals(number)])

    def statuses(self) -> list[int]:
        """Exit statuses so far, in the order in which the workers left."""
        files = sorted(self.folder.glob("*.status"), key=lambda file: file.stat().st_mtime_ns)
        return [int(file.read_text()) for file in files]

    def send(self, number: int | None = None) -> None:
        """Send every worker what it has not got yet, or the signal `number`."""
        for file in self.folder.glob("*.pid"):
            if file.with_suffix(".status").exists():
                continue
            pid, due = int(file.read_text()), self.signals[self._delivered.get(file.stem, 0) :]
            self._delivered[file.stem] = len(self.signals)
            for one in due if number is None else [number]:
                try:
                    os.kill(pid, one)
                except ProcessLookupError:
                    break  # ended since


def ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def supervise(arguments: list[str]) -> int:
    """Run torchrun with `arguments`; exit status 0, 75 (told to leave), 130 (Ctrl-C) or that of the first failure."""
    with tempfile.TemporaryDirectory(prefix="lpd_workers_") as folder:
        workers = Workers(Path(folder))
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup is respected
                signal.signal(number, workers.on_signal)
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--signals-to-handle=SIGQUIT", *arguments],
            env=os.environ | {STATUS_FOLDER: folder},
            start_new_session=True,  # out of the reach of the terminal's Ctrl-C
            preexec_fn=ignore_stop_signals,
        )
        left_since, killed = None, False
        while True:
            try:
                status = torchrun.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                workers.send()
            if left_since is None and any(code in TOLD_TO_LEAVE for code in workers.statuses()):
                left_since = time.monotonic()
            if not killed and left_since is not None and time.monotonic() - left_since > LEAVE_SECONDS:
                killed = True
                print(f"a worker has not left {LEAVE_SECONDS:.0f} s after the first: killing it", file=sys.stderr)
                workers.send(signal.SIGKILL)
        statuses = workers.statuses()
        failures = [code for code in statuses if code not in (0, *TOLD_TO_LEAVE)]
        if failures:
            return failures[0]
        if status == 0 or left_since is not None:
            return max((code for code in statuses if code in TOLD_TO_LEAVE), default=0)
        return status


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
