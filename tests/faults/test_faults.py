"""A share of the faults, in a minute or two: ``python -m tests.faults`` has all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="the launcher, which is attacked too, needs submitit")

from tests.faults.commands import COMMANDS, parser_of
from tests.faults.damage import damages_of, odd_json
from tests.faults.files import TARGETS
from tests.faults.flags import NOT_NUMBERS
from tests.faults.worker import Ended, Kind, judge
from tests.helpers.commands import ROOT

SHORT = """
import sys
from pathlib import Path
from tests.faults.__main__ import Faults, table

faults = Faults(Path(sys.argv[1]))
cases = [case for name, every in (("files", 11), ("flags", 1), ("disturbances", 6))
         for case in faults.cases(1, 50, 1, [name])[::every]]
found = [function(*arguments) for function, arguments in cases]
print(table(found))
for outcome in found:
    if outcome.kind.failed:
        print(outcome)
sys.exit(any(outcome.kind.failed for outcome in found))
"""


@pytest.mark.slow
def test_a_share_of_the_faults(tmp_path: Path) -> None:
    """Guards against tracebacks, hangs and wrong results that nobody notices; in a process that has started no threads,
    since it forks."""
    done = subprocess.run([sys.executable, "-c", SHORT, tmp_path / "faults"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| all |" in done.stdout


@pytest.mark.parametrize(
    ("status", "err", "right", "free", "kind"),
    [
        (0, "", True, False, Kind.RIGHT),
        (0, "12:00:01 W util.checkpoint: skipped: damaged\n", True, False, Kind.RIGHT),
        (0, "12:00:01 W util.checkpoint: skipped: damaged\n", False, False, Kind.FALLBACK),
        (0, "", False, True, Kind.OTHER),
        (0, "", False, False, Kind.WRONG),
        (2, "error: x is damaged.\n", False, False, Kind.REFUSED),
        (1, "error: the disk is full.\n", False, False, Kind.REFUSED),
        (2, "reading: 50%\r\x1b[Aerror: x is damaged.\n", False, False, Kind.REFUSED),
        (2, "error: x.\nerror: y.\n", False, False, Kind.TRACEBACK),
        (1, "", False, False, Kind.TRACEBACK),
        (70, "Traceback (most recent call last):\nKeyError: 'x'\n", False, False, Kind.TRACEBACK),
        (-11, "", False, False, Kind.TRACEBACK),
        (None, "", True, False, Kind.HANG),
    ],
)
def test_the_judge(status: int | None, err: str, right: bool, free: bool, kind: Kind) -> None:
    """Guards against a harness that passes whatever happens."""
    assert judge(Ended(status, "", err, 1.0), lambda: right, free)[0] == kind
    assert kind.failed == (kind in (Kind.TRACEBACK, Kind.HANG, Kind.WRONG))


def test_the_parsers_of_all_commands_are_found() -> None:
    """Guards against flags that are not attacked."""
    for command in COMMANDS.values():
        flags = {name for action in parser_of(command)._actions for name in action.option_strings}
        given = {word.partition("=")[0] for word in command.arguments.split() if word.startswith("--")}
        assert given <= flags, command.name


def test_there_are_hundreds_of_cases() -> None:
    assert sum(len(damages_of(Path(target.pattern))) for target in TARGETS) >= 300
    assert odd_json in damages_of(Path("header.json"))
    assert str(2**63) in NOT_NUMBERS
