"""Stages of the demo and the experiments: their record, and what becomes of one whose parent is stopped or killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import stages
from scripts.stages import OutOfTime, Stages
from tests.helpers.commands import ROOT
from tests.helpers.slurm_cluster import wait_until
from util.errors import UserError
from util.signals import pass_on_stop_signals

HANGS = "signal.alarm(60); signal.pause()"  # until a signal comes; what is forgotten ends in the end


def test_a_damaged_record_of_stages_is_refused(tmp_path: Path) -> None:
    """Guards against a stage that is left out because of what looks like a true value."""
    ran: list[int] = []
    work = Stages(tmp_path)
    work.run("work", lambda: ran.append(1), "command")
    whole = json.loads(work.path.read_text())
    for damaged in ("{", "[]", json.dumps({"work": 1}), json.dumps({"work": whole["work"] | {"finished": "false"}})):
        work.path.write_text(damaged)
        with pytest.raises(UserError, match=r"stages\.json is truncated or damaged"):
            work.run("work", lambda: ran.append(2), "command")
    work.path.write_text(json.dumps(whole))
    work.run("work", lambda: ran.append(3), "command")
    assert ran == [1]


def test_a_stage_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Guards against a stage that goes on after kill -9 and refuses, or disturbs, the one that is started again."""
    stage = f"import os, signal; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {HANGS}"
    code = "import sys; from pathlib import Path; from scripts.stages import Stages; "
    code += "Stages(Path(sys.argv[1])).command('work', '-c', sys.argv[2])"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path), stage], cwd=ROOT) as process:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 60, "the stage")
        process.kill()
    wait_until(lambda: not Path("/proc", (tmp_path / "pid").read_text()).exists(), 20, "the end of the stage")


SAVES = f"""
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    time.sleep(0.5)  # longer than the kernel needs to kill it
    (folder / "saved").touch()
    sys.exit(130 if number == signal.SIGINT else 75)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
(folder / "ready").touch()
{HANGS}
"""
STARTS = """
import sys
from pathlib import Path
from scripts.stages import OutOfTime, Stages
try:
    Stages(Path(sys.argv[1])).command("work", "-c", sys.argv[2], sys.argv[1])
except OutOfTime as reason:
    print(reason, flush=True)
    sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [
        (signal.SIGTERM, True, 75),  # scancel, preemption, timeout, the end of a part of the suite
        (signal.SIGTERM, False, 75),
        (signal.SIGUSR1, True, 75),  # Slurm, before the time limit
        (signal.SIGINT, True, -signal.SIGINT),  # Ctrl-C
        (signal.SIGINT, False, -signal.SIGINT),
    ],
)
def test_a_stage_that_is_told_to_stop_saves(
    tmp_path: Path, number: signal.Signals, to_group: bool, status: int
) -> None:
    """Guards against the kernel killing the stage, which still saves, because what started it has ended already."""
    words = (sys.executable, "-c", STARTS, tmp_path, SAVES)
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        wait_until((tmp_path / "ready").exists, 60, "the stage")
        (os.killpg if to_group else os.kill)(process.pid, number)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert (tmp_path / "saved").exists()
    assert ("told to stop in the stage 'work', which can be resumed" in printed) == (status == 75)
    assert not Stages(tmp_path).states()["work"]["finished"]


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])
def test_a_stage_that_saves_nothing_ends_or_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: str
) -> None:
    """Guards against a stop signal that is an error, or after which the next stage begins."""
    ready = tmp_path / "ready"
    os.mkfifo(ready)

    def not_passed_on(*_: object) -> None:
        raise AssertionError

    @contextlib.contextmanager
    def tells_when_passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
        with pass_on_stop_signals(process) as came:
            ready.write_text("")  # waits for the stage to open it
            yield came

    monkeypatch.setattr(stages, "pass_on_stop_signals", tells_when_passing_on)
    code = f"import os, signal; signal.signal(signal.SIGUSR2, signal.{handler}); open({str(ready)!r}).read(); "
    code += "os.kill(os.getppid(), signal.SIGUSR2)" + (f"; {HANGS}" if handler == "SIG_DFL" else "")
    before = signal.signal(signal.SIGUSR2, not_passed_on)
    try:
        with pytest.raises(OutOfTime, match="told to stop in the stage 'work'"):
            Stages(tmp_path).command("work", "-c", code)
        assert signal.getsignal(signal.SIGUSR2) is not_passed_on
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert Stages(tmp_path).states()["work"]["finished"] == (handler == "SIG_IGN")
