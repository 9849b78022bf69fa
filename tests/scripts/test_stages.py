"""Stages of the demo and the experiments: their record, and what becomes of one whose parent is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.stages import Stages
from tests.helpers.commands import ROOT
from tests.helpers.slurm_cluster import wait_until
from util.errors import UserError


def test_a_damaged_record_of_stages_is_refused(tmp_path: Path) -> None:
    """Guards against a stage that is left out because of what looks like a true value."""
    ran: list[int] = []
    stages = Stages(tmp_path)
    stages.run("work", lambda: ran.append(1), "command")
    whole = json.loads(stages.path.read_text())
    for damaged in ("{", "[]", json.dumps({"work": 1}), json.dumps({"work": whole["work"] | {"finished": "false"}})):
        stages.path.write_text(damaged)
        with pytest.raises(UserError, match=r"stages\.json is truncated or damaged"):
            stages.run("work", lambda: ran.append(2), "command")
    stages.path.write_text(json.dumps(whole))
    stages.run("work", lambda: ran.append(3), "command")
    assert ran == [1]


def test_a_stage_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Guards against a stage that goes on after kill -9 and refuses, or disturbs, the one that is started again."""
    stage = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = "import sys; from pathlib import Path; from scripts.stages import Stages; "
    code += "Stages(Path(sys.argv[1])).command('work', '-c', sys.argv[2])"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path), stage], cwd=ROOT) as process:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 60, "the stage")
        process.kill()
    wait_until(lambda: not Path("/proc", (tmp_path / "pid").read_text()).exists(), 20, "the end of the stage")
