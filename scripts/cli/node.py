"""What a Slurm job runs once per node: the command. Passes signals on to it and asks Slurm to requeue the job."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from submitit import JobEnvironment

from util.signals import REQUEUE_STATUS

logger = logging.getLogger("lpd.slurm")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_LIMIT_SIGNAL = signal.SIGUSR2  # submitit's; comes `signal_delay` seconds before the limit


def path_with_this_python() -> str:
    """PATH on which `python` is the one that runs this."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def launch_variables(job: JobEnvironment) -> dict[str, str]:
    """What launch.sh must know about the nodes."""
    return {
        "NNODES": str(job.num_nodes),
        "NODE_RANK": str(job.node),
        "MASTER_ADDR": job.hostnames[0],
        # Jobs that share a node get different ports, below the range from which systems choose free ones.
        "MASTER_PORT": str(12000 + int(job.raw_job_id) % 16000),
    }


class Child:
    """A command in a process group of its own; signals to this process are passed on to that group."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.signals: list[int] = []
        self._told_at: float | None = None  # when the signal of the time limit came
        self._process: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        self._process = subprocess.Popen(command, env=environment, process_group=0)
        for earlier in self.signals:  # before there was a process to pass them on to
            self._send(earlier)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        if number == TIME_LIMIT_SIGNAL and self._told_at is None:
            self._told_at = time.monotonic()
        logger.info("passing %s on", signal.Signals(number).name)
        self._send(number)

    def _send(self, number: int) -> bool:
        """Whether a process of the group is left to get the signal (0 only asks)."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
                return True
        return False

    def wait(self, patience: float) -> int | None:
        """Exit status as a shell gives it; None if it still runs `patience` seconds after the time limit's signal."""
        assert self._process is not None
        status = None
        # A signal may end the shell before the training that it started, which is still saving.
        while status is None or (status < 0 and self.signals and self._send(0)):
            if self._told_at is not None and time.monotonic() - self._told_at > patience:
                return None
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(0.5)
        return 128 - status if status < 0 else status


@dataclass(frozen=True)
class NodeTask:
    """The function of the job; its process's exit status becomes the job's.

    Args:
        nproc_per_node: processes on each node, or None to leave it to launch.sh.
        signal_delay: seconds from the time limit's signal to the limit.
        max_requeues: how often the job is requeued; a negative number for no limit.
    """

    command: tuple[str, ...]
    nproc_per_node: int | None
    signal_delay: int
    max_requeues: int

    def __call__(self) -> None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        job = JobEnvironment()
        status = self.run(job)
        logger.info("exit status %d", status)
        sys.exit(self.job_status(job, status))

    def run(self, job: JobEnvironment) -> int:
        """Exit status of the command: 75 also where a signal ended it, or where it does not exit before the limit."""
        variables = launch_variables(job) | {"PATH": path_with_this_python()}
        if self.nproc_per_node is not None:
            variables["NPROC_PER_NODE"] = str(self.nproc_per_node)
        logger.info("job %s, node %d of %d: %s", job.raw_job_id, job.node, job.num_nodes, " ".join(self.command))
        child = Child(self.command, os.environ | variables)
        status = child.wait(patience=0.75 * self.signal_delay)
        if status is None:
            logger.warning("the training did not exit in time; it will resume from its last checkpoint")
            return REQUEUE_STATUS
        # The signal may have come before the training had a handler for it.
        return REQUEUE_STATUS if status in {128 + number for number in child.signals} else status

    def job_status(self, job: JobEnvironment, status: int) -> int:
        """What this node says about the job, whose status is the highest of its nodes; the first node requeues it."""
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        # A node that fails writes a file: srun then ends the others by SIGTERM, as if the job were preempted.
        failure = job.paths.folder / f"{job.raw_job_id}_{restarts}_failed"
        if status not in (0, REQUEUE_STATUS):
            failure.write_text(f"node {job.node}: exit status {status}\n")
            return status
        if status == 0 or job.node != 0:
            return 0
        if failure.exists():
            logger.error("not requeued: %s", failure.read_text().strip())
            return 0
        self.requeue(job.raw_job_id, restarts)
        return REQUEUE_STATUS

    def requeue(self, job_id: str, restarts: int) -> None:
        """Ask Slurm to run the job again, unless it was cancelled or has been requeued too often."""
        state = job_state(job_id)
        if state != "RUNNING":
            logger.info("the job is %s: Slurm has decided already what happens to it", state)
        elif 0 <= self.max_requeues <= restarts:
            logger.error("the job has been requeued %d times, --max_requeues is %d", restarts, self.max_requeues)
        else:
            logger.info("requeueing job %s, time %d (limit: %s)", job_id, restarts + 1, self.max_requeues)
            subprocess.run(["scontrol", "requeue", job_id], check=True, timeout=60)


def job_state(job_id: str) -> str:
    """Slurm's name for the state of a job: RUNNING, COMPLETING (cancelled, or requeued by another command) …"""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    text = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout
    state = re.search(r"\bJobState=(\w+)", text)
    assert state is not None
    return state[1]
