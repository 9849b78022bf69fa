"""The launcher without Slurm: what it would submit, how signals and exit statuses travel, wrong arguments."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.slurm_cluster import wait_until
from tests.helpers.tiny_run import flags, make_cache, steps_done
from util.errors import UserError

slurm = pytest.importorskip("submitit.slurm.slurm")
from scripts.cli.node import SIGNALS, Child, launch_variables  # noqa: E402
from scripts.cli.run import minutes, parse  # noqa: E402

# In place of main_lpd.py: rank 1 leaves at once when told to, rank 0 saves for a second first.
TRAINER = """
import os, signal, sys, threading
rank, folder, mode = int(os.environ["LOCAL_RANK"]), sys.argv[1], sys.argv[2]
told = threading.Event()
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda *_: told.set())
with open(f"{folder}/ready{rank}", "w") as file:
    file.write(f"{os.getpid()} {os.getppid()}")
if mode == "crash" and rank == 1:
    sys.exit(5)
while not told.wait(0.1):
    pass
threading.Event().wait(0.6)  # for the signals that come right after the first one
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, were it to end the workers, would be seen
if rank == 0:
    threading.Event().wait(60 if mode == "hang" else 1)
    open(f"{folder}/saved", "w").close()
sys.exit(75)
"""


def run_py(*words: object, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/cli/run.py", *map(str, words)]
    environment = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_dry_run_of_the_published_command() -> None:
    """Guards against options that get lost on their way to sbatch, and the command's flags taken for the launcher's."""
    published = ("-J", "lpd", "-p", "gpu", "-A", "lab", "-N", 4, "--dry_run")
    more = ("-t", "2-00:00:00", "--mem", "200G", "--qos", "high", "--dependency", "afterok:7", "--exclude", "n[1-2]")
    result = run_py(*published, *more, "bash", "scripts/train/lpd_l_256.sh", "--epochs", 3, "-p", "x", path="/bin")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for option in (
        "job-name=lpd", "partition=gpu", "account=lab", "nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "requeue",
        "open-mode=append", "signal=USR2@120", "time=2880", "mem=200G", "qos=high", "dependency=afterok:7",
        "exclude='n[1-2]'", f"chdir={ROOT}", f"output={ROOT}/runs/slurm/lpd/%j_0_log.out", "cpus-per-task=32",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert not any("gpus-per-task" in line or "wckey" in line for line in lines)  # all GPUs are the node's one task's
    (srun,) = (line for line in lines if line.startswith("srun "))
    assert f"--cpus-per-task=32 {sys.executable} -u -m submitit" in srun
    assert lines[-1].endswith("bash scripts/train/lpd_l_256.sh --epochs 3 -p x")


def test_dry_run_of_the_published_launcher_flags() -> None:
    """Guards against published command lines that the parser refuses or whose values get lost."""
    published = "-J lpd_l_256 -p PARTITION -A ACCOUNT -N 4 --mode train --gpus-per-node 4 --timedelta 10 --max-retry -1"
    command = ("bash", "scripts/train/lpd_l_256.sh")
    result = run_py(*published.split(), "--output-dir", "runs/train/x", "--dry_run", *command, path="/bin")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == 1
    assert "--mode of the published code is not used here" in result.stderr
    lines = result.stdout.splitlines()
    for option in ("job-name=lpd_l_256", "gpus-per-node=4", "signal=USR2@600"):
        assert f"#SBATCH --{option}" in lines
    assert f"#SBATCH --output={Path.cwd()}/runs/train/x/%j_0_log.out" in lines
    job, _ = parse(["--job-name", "x", *published.split()[2:], *command])
    assert (job.job_name, job.max_requeues, job.command) == ("x", -1, command)


def test_no_value_adds_lines_to_the_batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("-A", "-p", "--mem", "--qos", "--constraint", "--exclude", "--dependency", "--log_dir", "-J", "-t"):
        with pytest.raises(UserError, match="printable"):
            parse([flag, "x\n#SBATCH --uid=0", "true"])
    (tmp_path / "a\ntrue").mkdir()
    monkeypatch.chdir(tmp_path / "a\ntrue")  # a relative folder is in this one
    with pytest.raises(UserError, match=r"--log_dir .*printable"):
        parse(["--log_dir", "logs", "true"])
    lines = run_py("--dry_run", "echo", "a\nrm b").stdout.splitlines()
    assert lines[-2:] == ["# the task of each node runs: echo 'a", "# rm b'"]


def test_values_with_the_shells_characters_stay_values(tmp_path: Path) -> None:
    """Bash runs the script with the Slurm commands replaced; no value may become a command or a second option."""
    odd = "x'; touch ran #$(touch ran)`touch ran` \\ --uid=0"
    given = [word for flag in ("-A", "-p", "--mem", "--qos", "--constraint", "--exclude") for word in (flag, odd)]
    result = run_py(*given, "--log_dir", tmp_path / odd, "-N", 2, "--dry_run", "true", odd, path="/bin")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("#SBATCH")]
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines]
    assert all(len(words) == 1 for words in options)
    assert f"--account={odd}" in [words[0] for words in options]
    script = f'srun() {{ printf "%s\\n" "$@"; }}\n{result.stdout}'
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"{tmp_path / odd}" in ran.stdout.splitlines()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_logs_that_cannot_be_made_is_named_before_anything_is_submitted() -> None:
    result = run_py("--log_dir", "/proc/none/here", "--dry_run", "true")
    assert result.returncode == 2
    assert "the output folder /proc/none/here can't be used" in result.stderr


def test_dry_run_on_one_node_without_gpus() -> None:
    """Guards against srun on one node, which would kill the task at once when the job is requeued."""
    result = run_py("-N", 1, "--gpus_per_node", 0, "--signal_delay", 30, "--dry_run", "true")
    assert f"exec {sys.executable} -u -m submitit.core._submit" in result.stdout
    assert "#SBATCH --signal=B:USR2@30\n" in result.stdout
    assert not any(word in result.stdout for word in ("srun", "gpus", "cpus", "partition", "account"))


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("90:01", 91), ("01:30:00", 90), ("2-12", 3600), ("1-00:30", 1470), ("1-00:00:01", 1441)],
)
def test_time_limits_are_read_as_by_sbatch(time: str, expected: int) -> None:
    assert minutes(time) == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "the command to run is missing"),
        (("-N", "0", "true"), "--nodes is 0"),
        (("-t", "soon", "true"), "--time 'soon'"),
        (("-t", "9" * 5000, "true"), "is not a time limit"),
        (("-A=", "true"), "-A is given an empty text"),
        (("-t", "2", "true"), "--signal_delay is 120"),
        (("-J", "../x", "true"), "--job_name '../x'"),
        (("--gpus_per_node", "-1", "true"), "--gpus_per_node is -1"),
        (("--cpus_per_task", "0", "true"), "--cpus_per_task is 0"),
    ],
)
def test_wrong_arguments(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=named.replace("..", r"\.\.")):
        parse(list(words))


def test_without_slurm_the_command_runs_here() -> None:
    """Guards against a silent fallback, a lost exit status, and several nodes where there is one machine."""
    result = run_py("-p", "gpu", "/bin/sh", "-c", "exit 7", path="/nowhere")
    assert result.returncode == 7
    assert "no Slurm here" in result.stderr
    for words, named in (
        (("-N", 2, "true"), "no sbatch on PATH"),
        (("-N", 2, "--local", "true"), "--local runs on this machine only"),
        (("--local", "no-such-command"), "no-such-command can't be run"),
    ):
        result = run_py(*words, path="/nowhere")
        assert result.returncode == 2
        assert named in result.stderr.splitlines()[-1]


def test_variables_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", 70123), ("JOB_NUM_NODES", 3), ("NODEID", 2), ("JOB_NODELIST", "gpu[07-08],old1")):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    expected = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "gpu07", "MASTER_PORT": "18123"}
    assert launch_variables(slurm.SlurmJobEnvironment()) == expected


def start_workers(folder: Path, mode: str, leave_seconds: float, stop_seconds: float = 60) -> subprocess.Popen[str]:
    """Two of the workers above under the supervisor."""
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    program = "import sys; from scripts.cli import supervise; "
    program += f"supervise.EXIT_SECONDS = {leave_seconds}; supervise.STOP_SECONDS = {stop_seconds}; "
    program += "sys.exit(supervise.supervise(sys.argv[1:]))"
    workers = ["--standalone", "--nproc_per_node", "2", "-m", "scripts.cli.worker", str(script), str(folder), mode]
    return subprocess.Popen([sys.executable, "-c", program, *workers], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "numbers", "leave_seconds", "status"),
    [
        ("save", [signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM], 60, 75),
        ("hang", [signal.SIGUSR1], 1, 75),
        ("crash", [], 60, 5),
    ],
)
def test_workers_leave_in_their_own_time(
    tmp_path: Path, mode: str, numbers: list[int], leave_seconds: float, status: int
) -> None:
    """Guards against torchrun ending the worker that still saves, its exit status 1 for everything, signals that reach
    the agent but not the workers, and a worker that never leaves."""
    process = start_workers(tmp_path, mode, leave_seconds)
    wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), 60, "two workers")
    for number in numbers:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert (tmp_path / "saved").exists() == (mode != "hang")
    assert errors.count("killing it") == (mode == "hang")


@pytest.mark.slow
def test_a_stopped_worker_does_not_keep_the_job(tmp_path: Path) -> None:
    """Guards against a job that SIGTERM can't end, because one rank hangs and the others wait for it."""
    process = start_workers(tmp_path, "hang", 60, stop_seconds=2)
    wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), 60, "two workers")
    os.kill(int((tmp_path / "ready1").read_text().split()[0]), signal.SIGSTOP)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "still runs 2 s after the first signal: killing it" in errors


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # dead, and not yet waited for


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["supervisor", "torchrun"])
def test_workers_die_with_what_started_them(tmp_path: Path, killed: str) -> None:
    """Guards against workers that train on and hold the output folder, so that the next start is refused."""
    process = start_workers(tmp_path, "save", 60)
    ready = [tmp_path / f"ready{rank}" for rank in (0, 1)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in ready), 60, "two workers")
    (worker, torchrun), (other, _) = (map(int, file.read_text().split()) for file in ready)
    os.kill(process.pid if killed == "supervisor" else torchrun, signal.SIGKILL)
    try:
        wait_until(lambda: not any(map(_runs, (worker, other, torchrun))), 5, "the end of all processes")
    finally:
        for pid in filter(_runs, (worker, other, torchrun)):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode != 0


@pytest.mark.slow
def test_folders_of_killed_supervisors_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against one more folder per kill, and against removing that of a running training."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def start(stack: contextlib.ExitStack) -> tuple[subprocess.Popen[str], Path]:
        for file in tmp_path.glob("ready*"):
            file.unlink()
        before = set(tmp_path.glob("lpd_status_*"))
        process = stack.enter_context(start_workers(tmp_path, "save", 60))
        stack.callback(process.kill)
        wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, 60, "two workers")
        (folder,) = set(tmp_path.glob("lpd_status_*")) - before
        os.utime(folder, (0, 0))  # as if it had been there for long
        return process, folder

    with contextlib.ExitStack() as stack:
        killed, left = start(stack)
        killed.kill()
        killed.wait()
        _, folder = start(stack)
        assert not left.exists()
        start(stack)
        assert folder.exists()


@pytest.mark.slow
def test_real_training_here_saves_and_asks_to_be_started_again(tmp_path: Path) -> None:
    """Guards against launch.sh, run.py --local or main_lpd.py losing the signal or the status on the way."""
    output = tmp_path / "run"
    training = ["bash", "scripts/launch.sh", *flags(make_cache(tmp_path / "codes"), output, epochs=100)]
    command = [sys.executable, "scripts/cli/run.py", "-N", "1", "--local", *training]
    with open(tmp_path / "log", "w") as log:
        environment = os.environ | {"NPROC_PER_NODE": "2"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        metrics = output / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, 120, "progress")
        process.terminate()
        assert process.wait(60) == 75, (tmp_path / "log").read_text()[-3000:]
    assert 0 < steps_done(output) < 800


@pytest.fixture
def restored_signals() -> object:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("restored_signals")
def test_a_shell_that_dies_of_the_signal_does_not_end_the_job(tmp_path: Path) -> None:
    """Guards against requeueing while the training, whose shell the signal has killed, is still saving."""
    saved = tmp_path / "saved"
    training = f"trap 'sleep 0.5; echo > {saved}; exit 75' USR2; echo > {tmp_path}/ready; while :; do sleep 0.1; done"
    child = Child(["bash", "-c", f'bash -c "{training}"; true'], dict(os.environ))
    wait_until((tmp_path / "ready").exists, 20, "the start")
    os.kill(os.getpid(), signal.SIGUSR2)
    assert child.wait(patience=30) == 128 + signal.SIGUSR2
    assert saved.exists()


@pytest.mark.usefixtures("restored_signals")
def test_patience_ends_before_the_time_limit(tmp_path: Path) -> None:
    """Guards against a job that is lost because its training does not leave."""
    training = f"trap '' USR2; echo > {tmp_path}/ready; until [[ -e {tmp_path}/end ]]; do sleep 0.1; done"
    child = Child(["bash", "-c", training], dict(os.environ))
    wait_until((tmp_path / "ready").exists, 20, "the start")
    os.kill(os.getpid(), signal.SIGUSR2)
    assert child.wait(patience=0.5) is None
    (tmp_path / "end").touch()
    assert child.wait(patience=60) == 0
