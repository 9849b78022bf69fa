"""Jobs of scripts/cli/run.py in a real Slurm on this machine: preempted, requeued, resumed, cancelled, crashed."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import ROOT
from tests.helpers.slurm_cluster import SlurmCluster, missing_programs, slurm_cluster, wait_until
from tests.helpers.tiny_run import flags, make_cache, steps_done, weights

MISSING = missing_programs()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed (no {', '.join(MISSING)}); see --with-slurm"),
]
EPOCHS = 20  # of 8 steps by two processes
SIGNAL_DELAY = 85  # Slurm looks every 30 seconds, and sends the signal up to as much earlier
TIME_TO_SIGNAL = 75  # the least that a shortened limit leaves: a look, and then time to save on a busy machine

Submit = Callable[..., str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def submit(cluster: SlurmCluster, tmp_path: Path) -> Submit:
    """Submits as a user does; gives the job's number."""

    def submit(name: str, *words: object, processes: int = 1) -> str:
        options = ["-J", name, "-p", "test", "-A", "nobody", "--gpus_per_node", 0, "--log_dir", tmp_path / name]
        command = [sys.executable, "scripts/cli/run.py", *options, *words]
        # One thread each; no PATH to the environment's Python, which the job must find by itself.
        environment = cluster.environment | {"NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = os.pathsep.join(["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"])
        result = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        (number,) = re.findall(r"job (\d+) submitted", result.stdout)
        return number

    return submit


def log_of(folder: Path, job: str) -> str:
    file = folder / f"{job}_0_log.out"
    return file.read_text(errors="replace") if file.exists() else ""


def running(output: Path) -> list[int]:
    """Numbers of the trainings' processes that write to a folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # ended meanwhile
            if str(output).encode() in words and any(word.endswith(b"/python") for word in words[:1]):
                found.append(int(process.name))
    return found


def metrics_lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def freeze(output: Path) -> list[int]:
    pids = running(output)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def test_preempted_trainings_end_like_an_uninterrupted_one(
    cluster: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    """Guards against signals that don't reach the workers, lost work, jobs that don't come back or come back twice.

    One job of two processes on one node is preempted by `scontrol requeue` and by its time limit; one of two nodes with
    a process each by its time limit.
    """
    cache = make_cache(tmp_path / "codes")
    one, two, whole = tmp_path / "one", tmp_path / "two", tmp_path / "whole"

    def training(output: Path) -> list[str]:
        return ["bash", "scripts/launch.sh", *flags(cache, output, EPOCHS)]

    limits = ("--time", 60, "--signal_delay", SIGNAL_DELAY)
    first = submit("first", *limits, "-N", 1, *training(one), processes=2)
    second = submit("second", *limits, "-N", 2, *training(two))

    requeued: list[str] = []
    frozen: list[int] = []

    def both_on_their_way() -> bool:
        if not requeued and metrics_lines(one) > 2:
            requeued.append(cluster.call("scontrol", "requeue", first))
        if not frozen and metrics_lines(two) > 2:
            frozen.extend(freeze(two))
        return bool(requeued and frozen)

    wait_until(both_on_their_way, 90, "progress of both jobs")
    cluster.wait_for(first, "PENDING")
    saved = steps_done(one)
    assert 0 < saved < EPOCHS * 8
    lines = metrics_lines(one)
    wait_until(lambda: metrics_lines(one) > lines + 2, 90, "progress of the first job after its requeueing")
    frozen += freeze(one)

    for job in (first, second):  # trainings stand still meanwhile: however fast they are, the limit finds them
        limit = math.ceil((cluster.seconds_run(job) + TIME_TO_SIGNAL) / 60)
        cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    wait_until(
        lambda: "SIGUSR2" in log_of(tmp_path / "first", first) and "SIGUSR2" in log_of(tmp_path / "second", second),
        90,
        "the signal before the time limit",
    )
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    for job in (first, second):
        cluster.wait_for(job, "PENDING")
        cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert saved < steps_done(one) < EPOCHS * 8
    assert 0 < steps_done(two) < EPOCHS * 8

    environment = os.environ | {"NPROC_PER_NODE": "2"}
    subprocess.run(training(whole), cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    expected = weights(whole)
    for job, restarts, output in ((first, "2", one), (second, "1", two)):
        ended = cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=90)
        log = log_of(output.parent / ended["JobName"], job)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", restarts), log[-3000:]
        assert log.count("resuming from") == int(restarts)  # appended to, not overwritten
        for name, value in weights(output).items():
            assert torch.equal(value, expected[name]), f"{name} of the {ended['JobName']} job differs"


def test_what_is_not_requeued(cluster: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    """Guards against crashes that are tried again, statuses that get lost, endless requeues, and jobs that come back
    although their user cancelled them."""
    crash = submit("crash", "bash", "-c", "exit 3")
    waits = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    # The second node fails once the first is ready; srun ends that by SIGTERM, which looks like a preemption.
    first_log = tmp_path / "two" / "${SLURM_JOB_ID}_0_log.out"
    fails = f"until grep -q ready {first_log}; do sleep 0.1; done; exit 4"
    crash_of_two = submit("two", "-N", 2, "bash", "-c", f"if [[ $NODE_RANK == 1 ]]; then {fails}; fi; {waits}")
    endless = submit("endless", "--max_requeues", 1, "bash", "-c", "exit 75")
    cancelled = submit("cancelled", "bash", "-c", waits)
    wait_until(lambda: "ready" in log_of(tmp_path / "cancelled", cancelled), 60, "the start of the job to be cancelled")
    cluster.call("scancel", cancelled)
    for job, state, code, restarts in (
        (crash, "FAILED", "3:0", "0"),
        (crash_of_two, "FAILED", "4:0", "0"),
        (endless, "FAILED", "75:0", "1"),
    ):
        ended = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == (state, code, restarts)
    ended = cluster.wait_for(cancelled, "CANCELLED")
    assert ended["Restarts"] == "0"
    assert "Slurm has decided already" in log_of(tmp_path / "cancelled", cancelled)


def test_early_signal_and_wrong_account(cluster: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    """Guards against a job that is lost because the signal came before the training could handle it, and against a
    traceback where Slurm refuses a job."""
    early = submit("early", "bash", "-c", "echo ready; [[ -n ${SLURM_RESTART_COUNT:-} ]] || sleep 300")
    wait_until(lambda: "ready" in log_of(tmp_path / "early", early), 60, "the start of the job")
    cluster.call("scancel", "--batch", "--signal=USR2", early)
    assert cluster.wait_for(early, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert cluster.job(early)["Restarts"] == "1"
    options = ["-p", "nowhere", "--gpus_per_node", "0", "--log_dir", str(tmp_path / "no")]
    command = [sys.executable, "scripts/cli/run.py", *options, "true"]
    result = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "Invalid partition" in result.stderr.splitlines()[-1]
