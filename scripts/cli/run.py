"""Run a command as a Slurm job that survives preemption and time limits, or here.

    python scripts/cli/run.py -J NAME -p PARTITION -A ACCOUNT -N NODES bash scripts/train/lpd_l_256.sh [flags]

The job gets one task per node, which runs the command with the variables that scripts/launch.sh takes; launch.sh starts
one process per GPU. Before the time limit or on preemption the processes save and exit with status 75, and the job is
put back into the queue under the same number; started again it resumes. Any other status ends the job.
A job on one node has the cluster's KillWait to save in when it is preempted; Slurm signals it during the partition's
grace time only with PreemptParameters=send_user_signal. What can't be saved in time resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # started by its path

import submitit  # noqa: E402
from submitit.core.utils import FailedJobError  # noqa: E402

from scripts.cli.node import TIME_LIMIT_SIGNAL, NodeTask, path_with_this_python  # noqa: E402
from util.cli import Parser, exit_on_user_error, from_args  # noqa: E402
from util.config import check, record, setting  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.files import check_output_dir  # noqa: E402

# Settings that go to sbatch as they are.
SBATCH_OPTIONS = ("job_name", "nodes", "partition", "account", "mem", "qos", "constraint", "exclude", "dependency")


def minutes(time: str) -> int:
    """A time limit as sbatch takes it (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) in minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", time)
    if match is None:
        raise UserError(f"--time {time!r} is not a time limit; give minutes, HH:MM:SS or D-HH:MM:SS.")
    days, *rest = match.groups()
    fields = [int(field) for field in rest if field is not None]
    if days is None:  # the last of one field is minutes, of several seconds
        fields = [0, fields[0], 0] if len(fields) == 1 else [0] * (3 - len(fields)) + fields
    hour, minute, second = (*fields, 0, 0)[:3]
    return -(-(((int(days or 0) * 24 + hour) * 60 + minute) * 60 + second) // 60)


@dataclass(frozen=True)
class JobConfig:
    """A command and the job that runs it. Names are sbatch's where it has such an option; None leaves it to Slurm.

    Raises:
        UserError: for values that no job can have.
    """

    command: tuple[str, ...]
    job_name: str = setting("lpd", "name of the job and of its folder of logs", aliases=("-J", "--job-name"))
    nodes: int = setting(1, "number of nodes", at_least=1, aliases=("-N",))
    partition: str | None = setting(None, "(default: the cluster's)", aliases=("-p",))
    account: str | None = setting(None, "(default: yours)", aliases=("-A",))
    time: str = setting(
        "1-00:00:00", "limit until the job is requeued: minutes, HH:MM:SS or D-HH[:MM[:SS]]", aliases=("-t",)
    )
    gpus_per_node: int = setting(
        8, "one process each; 0 on machines without GPUs", at_least=0, aliases=("--gpus-per-node",)
    )
    cpus_per_task: int | None = setting(
        None, "CPU cores per node (default: 4 per GPU, without GPUs the cluster's)", at_least=1
    )
    mem: str | None = setting(None, "memory per node, such as 200G; 0 is all (default: the cluster's)")
    qos: str | None = setting(None, "quality of service")
    constraint: str | None = setting(None, "features that the nodes must have")
    exclude: str | None = setting(None, "nodes not to use")
    dependency: str | None = setting(None, "what must have happened before, such as afterok:1234")
    log_dir: Path | None = setting(None, "logs, by job number (default: runs/slurm/NAME)", aliases=("--output-dir",))
    signal_delay: int = setting(120, "seconds before the time limit at which the job is told to save", at_least=1)
    max_requeues: int = setting(
        100, "how often the job goes back into the queue; a negative number: no limit", aliases=("--max-retry",)
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.command:
            raise UserError("the command to run is missing; give it last, such as: bash scripts/train/lpd_l_256.sh.")
        # The batch script has all of these, quoted; a line break would start a line of it all the same.
        for name, value in {**record(self), "log_dir": str(self.folder), "chdir": str(ROOT)}.items():
            if isinstance(value, str) and not value.isprintable():
                raise UserError(f"--{name} {value!r} must be one line of printable characters.")
        if not re.fullmatch(r"[\w.@+-]+", self.job_name) or self.job_name.startswith("."):
            raise UserError(
                f"--job_name {self.job_name!r} has to serve as a folder's name; use letters, digits, _ . + -."
            )
        limit = 60 * minutes(self.time)
        if limit <= self.signal_delay:
            raise UserError(f"--signal_delay is {self.signal_delay} s; it must be less than --time, {limit} s.")

    @property
    def folder(self) -> Path:
        """Where the logs go, absolute."""
        return ROOT / "runs" / "slurm" / self.job_name if self.log_dir is None else self.log_dir.absolute()


def build_parser() -> Parser:
    parser = Parser(
        prog="python scripts/cli/run.py",
        usage="%(prog)s -J NAME -p PARTITION -A ACCOUNT -N NODES [options] bash scripts/train/lpd_l_256.sh [flags]",
        description="Run a command as a Slurm job that is requeued and resumes after preemption and time limits.",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command with its flags; comes last")
    parser.add_config(JobConfig)
    add = parser.add_argument
    add("--timedelta", type=int, metavar="MINUTES", help="--signal_delay in minutes")
    add("--dry_run", action="store_true", help="print the sbatch file and submit nothing; needs no Slurm")
    add("--local", action="store_true", help="run the command here, without Slurm")
    parser.add_unused("--mode", instead="the command at the end of the line says what runs")
    return parser


def parse(arguments: list[str] | None = None) -> tuple[JobConfig, argparse.Namespace]:
    """The job, and the flags ``dry_run`` and ``local``."""
    args = build_parser().parse_args(arguments)
    if args.timedelta is not None:
        args.signal_delay = 60 * args.timedelta
    return from_args(JobConfig, args, command=tuple(args.command)), args


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, which can also show the sbatch file where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def sbatch_file(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def build_executor(job: JobConfig) -> SlurmExecutor:
    check_output_dir(job.folder)
    python = shlex.quote(sys.executable)
    extra: dict[str, Any] = {"requeue": True, "chdir": ROOT}
    if job.nodes == 1:
        # Without srun, which kills its task at once when the job is requeued; Slurm's signals then go to the batch
        # process (B:), which the task takes the place of (exec).
        python = f"exec {python}"
        extra["signal"] = f"B:{TIME_LIMIT_SIGNAL.name.removeprefix('SIG')}@{job.signal_delay}"
    srun_args = ["--kill-on-bad-exit=1", "--open-mode=append"]
    cpus = job.cpus_per_task or 4 * job.gpus_per_node or None
    if cpus is not None:
        srun_args.append(f"--cpus-per-task={cpus}")  # sbatch does not hand it down since Slurm 22.05
    executor = SlurmExecutor(job.folder, python=python)
    executor.update_parameters(
        **{name: getattr(job, name) for name in SBATCH_OPTIONS},
        time=minutes(job.time),
        gpus_per_node=job.gpus_per_node or None,
        cpus_per_task=cpus,
        ntasks_per_node=1,
        signal_delay_s=job.signal_delay,
        stderr_to_stdout=True,
        use_srun=job.nodes > 1,
        srun_args=srun_args,
        wckey=None,
        additional_parameters=extra,
    )
    return executor


def run_here(job: JobConfig, asked_for: bool) -> None:
    """Replace this process by the command."""
    if job.nodes > 1:
        place = "--local runs on this machine only" if asked_for else "there is no Slurm here (no sbatch on PATH)"
        raise UserError(f"--nodes is {job.nodes}, but {place}.")
    if not asked_for:
        print("there is no Slurm here (no sbatch on PATH): running the command on this machine", file=sys.stderr)
    os.chdir(ROOT)
    os.environ["PATH"] = path_with_this_python()
    try:
        os.execvp(job.command[0], job.command)
    except OSError as error:
        raise UserError(f"{job.command[0]} can't be run: {error.strerror}.") from None


def submit(job: JobConfig) -> None:
    # The job inherits NPROC_PER_NODE where it is set.
    processes = None if "NPROC_PER_NODE" in os.environ else job.gpus_per_node or None
    task = NodeTask(job.command, processes, job.signal_delay, job.max_requeues)
    try:
        submitted = build_executor(job).submit(task)
    except FailedJobError as error:
        sentence = str(error).strip().splitlines()[-1]
        raise UserError(f"Slurm did not take the job: {sentence}") from None
    print(f"job {submitted.job_id} submitted; log: {os.path.relpath(submitted.paths.stdout)}")


def main() -> None:
    job, args = parse()
    if args.dry_run:
        print(build_executor(job).sbatch_file())
        print("# the task of each node runs:", shlex.join(job.command).replace("\n", "\n# "))
    elif args.local or shutil.which("sbatch") is None:
        run_here(job, asked_for=args.local)
    else:
        submit(job)


if __name__ == "__main__":
    exit_on_user_error(main)
