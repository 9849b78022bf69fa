"""Run a command as a Slurm job that survives preemption and time limits, or here.

    python scripts/cli/run.py -J NAME -p PARTITION -A ACCOUNT -N NODES bash scripts/train/lpd_l_256.sh [flags]

The job gets one task per node, which runs the command with the variables that scripts/launch.sh takes; launch.sh starts
one process per GPU. Before the time limit or on preemption the processes save and leave with status 75, and the job is
put back into the queue under the same number; started again it goes on where it was. Any other status ends the job.
A job on one node has the cluster's KillWait to save in when it is preempted; Slurm signals it during the partition's
grace time only with PreemptParameters=send_user_signal. What can't be saved in time goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # started by its path

import submitit  # noqa: E402
from submitit.core.utils import FailedJobError  # noqa: E402

from scripts.cli.node import TIME_LIMIT_SIGNAL, NodeTask, path_with_this_python  # noqa: E402
from util.cli import HelpFormatter, exit_on_user_error  # noqa: E402
from util.errors import UserError  # noqa: E402

SBATCH_OPTIONS = (
    "job_name", "nodes", "partition", "account", "time", "cpus_per_task", "mem", "qos", "constraint", "exclude",
    "dependency",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python scripts/cli/run.py",
        usage="%(prog)s -J NAME -p PARTITION -A ACCOUNT -N NODES [options] bash scripts/train/lpd_l_256.sh [flags]",
        description="Run a command as a Slurm job that is requeued and goes on after preemption and time limits.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", nargs=argparse.REMAINDER, help="the command with its flags; comes last")
    add("-J", "--job_name", default="lpd", metavar="NAME", help="name of the job and of its folder of logs")
    add("-N", "--nodes", type=int, default=1, help="number of nodes")
    add("-p", "--partition", help="(default: the cluster's)")
    add("-A", "--account", help="(default: yours)")
    add("-t", "--time", default="1-00:00:00", help="limit of one stretch: minutes, HH:MM:SS or D-HH[:MM[:SS]]")
    add("--gpus_per_node", type=int, default=8, help="one process each; 0 on machines without GPUs")
    add("--cpus_per_task", type=int, help="CPU cores per node (default: 4 per GPU, without GPUs the cluster's)")
    add("--mem", help="memory per node, such as 200G; 0 is all (default: the cluster's)")
    add("--qos", help="quality of service")
    add("--constraint", help="features that the nodes must have")
    add("--exclude", help="nodes not to use")
    add("--dependency", help="what must have happened before, such as afterok:1234")
    add("--log_dir", type=Path, help="logs, by job number (default: runs/slurm/NAME)")
    add("--signal_delay", type=int, default=120, help="seconds to save and leave in, before the time limit")
    add("--max_requeues", type=int, default=100, help="how often the job goes back into the queue")
    add("--dry_run", action="store_true", help="print the sbatch file and submit nothing; needs no Slurm")
    add("--local", action="store_true", help="run the command here, without Slurm")
    return parser


def minutes(time: str) -> int:
    """A time limit as sbatch takes it (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) in minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(f"--time {time!r} is no time limit; give minutes, HH:MM:SS or D-HH:MM:SS.")
    days, *rest = match.groups()
    fields = [int(field) for field in rest if field is not None]
    if days is None:  # the last of one field is minutes, of several seconds
        fields = [0, fields[0], 0] if len(fields) == 1 else [0] * (3 - len(fields)) + fields
    hour, minute, second = (*fields, 0, 0)[:3]
    return -(-(((int(days or 0) * 24 + hour) * 60 + minute) * 60 + second) // 60)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError for values that no job can have."""
    args = build_parser().parse_args(arguments)
    if not args.command:
        raise UserError("the command to run is missing; give it last, such as: bash scripts/train/lpd_l_256.sh.")
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("signal_delay", 1), ("max_requeues", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {least}.")
    if args.cpus_per_task is not None and args.cpus_per_task < 1:
        raise UserError(f"--cpus_per_task is {args.cpus_per_task}; it must be at least 1.")
    if not re.fullmatch(r"[\w.@+-]+", args.job_name) or args.job_name.startswith("."):
        raise UserError(f"--job_name {args.job_name!r} has to serve as a folder's name; use letters, digits, _ . + -.")
    args.time = minutes(args.time)
    if args.time * 60 <= args.signal_delay:
        raise UserError(f"--signal_delay is {args.signal_delay} s; it must be less than --time, {args.time * 60} s.")
    if args.cpus_per_task is None and args.gpus_per_node:
        args.cpus_per_task = 4 * args.gpus_per_node
    return args


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, which can also show the sbatch file where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def sbatch_file(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def build_executor(args: argparse.Namespace) -> SlurmExecutor:
    folder = (ROOT / "runs" / "slurm" / args.job_name) if args.log_dir is None else args.log_dir.absolute()
    python = shlex.quote(sys.executable)
    extra: dict[str, Any] = {"requeue": True, "chdir": ROOT}
    if args.nodes == 1:
        # Without srun, which kills its task at once when the job is requeued; Slurm's signals then go to the batch
        # process (B:), which the task takes the place of (exec).
        python = f"exec {python}"
        extra["signal"] = f"B:{TIME_LIMIT_SIGNAL.name.removeprefix('SIG')}@{args.signal_delay}"
    executor = SlurmExecutor(folder, python=python)
    srun_args = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if args.cpus_per_task is not None:
        srun_args.append(f"--cpus-per-task={args.cpus_per_task}")  # not handed down by sbatch since Slurm 22.05
    executor.update_parameters(
        **{name: value for name in SBATCH_OPTIONS if (value := getattr(args, name)) is not None},
        gpus_per_node=args.gpus_per_node or None,
        ntasks_per_node=1,
        signal_delay_s=args.signal_delay,
        stderr_to_stdout=True,
        use_srun=args.nodes > 1,
        srun_args=srun_args,
        wckey=None,
        additional_parameters=extra,
    )
    return executor


def main() -> None:
    args = parse()
    if not args.dry_run and (args.local or shutil.which("sbatch") is None):
        if args.nodes > 1:
            place = "--local runs on this machine only" if args.local else "there is no Slurm here (no sbatch on PATH)"
            raise UserError(f"--nodes is {args.nodes}, but {place}.")
        if not args.local:
            print("there is no Slurm here (no sbatch on PATH): running the command on this machine", file=sys.stderr)
        os.chdir(ROOT)
        os.environ["PATH"] = path_with_this_python()
        try:
            os.execvp(args.command[0], args.command)
        except OSError as error:
            raise UserError(f"{args.command[0]} can't be run: {error.strerror}.") from None
    executor = build_executor(args)
    if args.dry_run:
        print(executor.sbatch_file())
        print(f"# the task of each node runs: {shlex.join(args.command)}")
        return
    try:
        # The job inherits NPROC_PER_NODE where it is set.
        processes = None if "NPROC_PER_NODE" in os.environ else args.gpus_per_node or None
        job = executor.submit(NodeTask(tuple(args.command), processes, args.signal_delay, args.max_requeues))
    except FailedJobError as error:
        sentence = str(error).strip().splitlines()[-1]
        raise UserError(f"Slurm did not take the job: {sentence}") from None
    print(f"job {job.job_id} submitted; log: {os.path.relpath(job.paths.stdout)}")


if __name__ == "__main__":
    exit_on_user_error(main)
