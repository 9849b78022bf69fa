"""All faults, and the table of what they came to:

    python -m tests.faults [--rounds 1] [--flags 1000] [--turns 3] [--only files flags disturbances] \\
        [--commands "hub push" run.py] [--minutes 10] [--output TABLE.md]

Exit status 1 if something ended in a traceback, hung, or gave a wrong result silently; each of these is printed.
"""

from __future__ import annotations

import collections
import math
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.faults.commands import COMMANDS, make_inputs, prepare_process
from tests.faults.disturbances import Disturbances, may_mount
from tests.faults.files import DamagedFiles
from tests.faults.flags import BadFlags, add_odd_files, share_of
from tests.faults.worker import Kind, Outcome
from util.cli import Parser, exit_on_user_error
from util.files import atomic_write, check_output_file

Case = tuple[Callable[..., Outcome], tuple[Any, ...]]
GROUPS = ("files", "flags", "disturbances")


class Faults:
    """All of them, in a folder that is made here."""

    def __init__(self, folder: Path) -> None:
        prepare_process()
        inputs = folder / "inputs"
        make_inputs(inputs)
        self.files = DamagedFiles(inputs, folder / "scratch")
        self.disturbances = Disturbances(self.files, folder / "scratch")
        shutil.copytree(inputs, folder / "inputs_of_flags")
        add_odd_files(folder / "inputs_of_flags")
        self.flags = BadFlags(folder / "inputs_of_flags", folder / "scratch")

    def cases(
        self, rounds: int, flags: int, turns: int, only: Sequence[str] = GROUPS, commands: Collection[str] = COMMANDS
    ) -> list[Case]:
        """Functions, each of which makes an outcome, and their arguments.

        Args:
            rounds: how often each kind of damage is done to each kind of file.
            flags: how many bad flags.
            commands: names of those that are attacked.
            turns: how often a command is killed, started twice, and so on.
        """
        # With the name of the command that each attacks.
        groups: dict[str, Callable[[], list[tuple[str, Case]]]] = {
            "files": lambda: [(case[0].command, (self.files.run, case)) for case in self.files.cases(rounds)],
            "flags": lambda: [(case.command.name, (self.flags.run, (case,))) for case in self.flags.cases()],
            "disturbances": lambda: [
                (words[0].name if words else "train", (function, words))  # without: a rank of a training is stopped
                for function, words in self.disturbances.cases(turns)
            ],
        }
        found: list[Case] = []
        for name in only:
            chosen = [case for command, case in groups[name]() if command in commands]
            found += share_of(chosen, flags) if name == "flags" else chosen
        return found


def table(outcomes: Iterable[Outcome]) -> str:
    """How many cases of each group came to what, in Markdown."""
    counts: dict[str, collections.Counter[Kind]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.group, collections.Counter())[outcome.kind] += 1
    counts["all"] = sum(counts.values(), collections.Counter())
    lines = [["fault", "cases", *(kind.value.lower() for kind in Kind)], ["---", *["--:"] * (1 + len(Kind))]]
    for group, found in counts.items():
        lines.append([group, str(found.total()), *(str(found[kind]) for kind in Kind)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def main() -> None:
    parser = Parser(prog="python -m tests.faults", description="Damage, kill, fill and mislead every command.")
    parser.add_argument("--rounds", type=int, default=1, help="of each damage to each kind of file")
    parser.add_argument("--flags", type=int, default=1000, help="bad flags")
    parser.add_argument("--turns", type=int, default=3, help="of kills, full disks and double starts per command")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="(default: all)")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=tuple(COMMANDS), help="(default: all)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="a random share that takes so long; the last case begun is finished (default: all)",
    )
    parser.add_argument("--output", type=Path, help="write the table to this file")
    args = parser.parse_args()
    if args.output is not None:
        check_output_file(args.output)
    start, found = time.monotonic(), []
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # what is synced to a disk takes longer
    with tempfile.TemporaryDirectory(prefix="faults_", dir=memory) as folder:
        cases = Faults(Path(folder)).cases(args.rounds, args.flags, args.turns, args.only, args.commands)
        if math.isfinite(args.minutes):
            random.Random(0).shuffle(cases)
        for function, arguments in tqdm(cases):
            if time.monotonic() - start > 60 * args.minutes:
                break
            found.append(outcome := function(*arguments))
            if outcome.kind.failed:
                tqdm.write(f"{outcome.kind.value}: {outcome.group}: {outcome.case}: {outcome.said}")
            if args.output is not None and len(found) % 10 == 0:
                _write(args.output, f"{table(found)}\nunfinished\n")
    minutes, cores = (time.monotonic() - start) / 60, len(os.sched_getaffinity(0))
    left_out = "" if may_mount() else "; without full and read-only file systems, since nothing can be mounted here"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    share = "" if len(found) == len(cases) else f"; a random share of {len(cases)} cases"
    text = f"{table(found)}\n{versions}, {cores} cores, {minutes:.0f} minutes{share}{left_out}.\n"
    print(text)
    if args.output is not None:
        _write(args.output, text)
    sys.exit(any(outcome.kind.failed for outcome in found))


if __name__ == "__main__":
    exit_on_user_error(main)
