"""A whole Slurm on this machine for tests: munged, slurmctld and one slurmd per node, all state in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

# The name of the first node, where rank 0 listens, is that of this machine. A requeued job waits for `cred_expire`.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=600
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=4 RealMemory=4000
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll; TimeoutError with `what` after `seconds`."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come about in {seconds:.0f} seconds")
        pause.wait(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class SlurmCluster:
    """What tests ask a running cluster; `environment` makes Slurm's commands talk to it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def call(self, *command: object) -> str:
        """Standard output of one of Slurm's commands."""
        words = [str(word) for word in command]
        return subprocess.run(
            words, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, ExitCode …"""
        words = self.call("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def seconds_run(self, job_id: str) -> int:
        """How long the job has been running since its last start; Slurm writes [D-]HH:MM:SS."""
        days, _, time_of_day = self.job(job_id)["RunTime"].rpartition("-")
        hours, minutes, seconds = map(int, time_of_day.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    def wait_for(self, job_id: str, *states: str, seconds: float = 60) -> dict[str, str]:
        wait_until(lambda: self.job(job_id)["JobState"] in states, seconds, f"job {job_id} {' or '.join(states)}")
        return self.job(job_id)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start the daemons; stop them and every job at the end, whatever happened.

    Raises:
        TimeoutError: where they don't come up; its notes hold the ends of their logs.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: the path of a socket has at most 107 characters
    host = socket.gethostname().split(".")[0]
    daemons: list[subprocess.Popen[bytes]] = []
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(*command: object) -> None:
        with open(folder / "daemons.log", "ab") as log:
            # Ends with this process even where that is killed.
            words = ["setpriv", "--pdeathsig", "KILL", *(str(word) for word in command)]
            daemons.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    try:
        folder.chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()
        controller_port, *ports = _free_ports(3)
        text = CONFIGURATION.format(
            folder=folder, host=host, controller_port=controller_port, ports=ports, user=Path(folder).owner()
        )
        (folder / "slurm.conf").write_text(text)
        cluster = SlurmCluster(folder, environment)
        start(
            "munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log",
        )  # fmt: skip
        wait_until((folder / "munge.socket").exists, 20, "munged's socket")
        start("slurmctld", "-D")
        for node in (host, f"{host}-2"):
            start("slurmd", "-D", "-N", node)

        def idle() -> bool:
            sinfo = subprocess.run(
                ["sinfo", "--noheader", "--Node", "--format=%t"], env=environment, capture_output=True, text=True
            )
            return sinfo.stdout.split() == ["idle", "idle"]

        wait_until(idle, 60, "two idle nodes")
        yield cluster
    except BaseException as error:
        for log in sorted(folder.glob("*.log")):
            error.add_note(f"{log.name}: {log.read_text(errors='replace')[-3000:]}")
        raise
    finally:
        _stop(daemons, folder, environment)


def _stop(daemons: list[subprocess.Popen[bytes]], folder: Path, environment: dict[str, str]) -> None:
    def call(*command: str) -> str:
        return subprocess.run(command, env=environment, timeout=20, capture_output=True, text=True).stdout

    with contextlib.suppress(subprocess.SubprocessError, OSError, TimeoutError):
        call("scancel", "--quiet", "--full", "--signal=KILL", "--state=RUNNING")
        call("scancel", "--quiet", "--me")
        wait_until(lambda: not call("squeue", "--noheader"), 40, "the end of all jobs")
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    shutil.rmtree(folder, ignore_errors=True)
