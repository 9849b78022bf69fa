"""Bad flags, made from the parsers of the commands."""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scripts.benchmarking
from tests.faults.commands import COMMANDS, Command, parser_of
from tests.faults.worker import LIMIT_S, Kind, Outcome, call, judge, patched

GROUP = "bad flags"

NOT_NUMBERS = (
    *("", "x", "nan", "inf", "-inf", "0x10", "1 2", "1e20"),
    *(str(10**20), str(-(10**20)), str(2**63), "9" * 5000),
)
EXTREME = ("-1", "0", str(10**9), str(2**62), "1e300", "1e-300", "-1e300")
# A large one of these is much work, and nothing else.
LONG_WORK = frozenset((
    *("epochs", "steps", "max_steps", "num_images", "num", "runs", "batch_runs", "warmup", "speed_runs"),
    *("generation_steps", "warmup_epochs", "index"),
))  # fmt: skip
OUTPUTS = frozenset(("output", "output_dir", "cached_path", "folder", "log_dir", "profile"))
NO_OUTPUTS = (
    "", "/proc/none/here", "/dev/null", "/dev/null/here", "/sys/here", "n" * 300, "d/" * 3000 + "x", "pictures.npz/x",
    "/proc/self/mem", "link_to_itself/x",
)  # fmt: skip
ODD_TEXTS = ("a\nrm -rf b", 'it\'s "odd" \\ $(touch ran) `touch ran` # --x', " ", "9" * 5000, "../../x")
NO_INPUTS = ("", "nowhere", "/dev/null", "/dev/zero", "/proc/self/mem", "n" * 300, "pipe", "link_to_itself", "/")


@dataclass(frozen=True)
class BadFlag:
    """A flag with a value that is refused, or with one so odd that it may be refused (`must` is false)."""

    command: Command
    action: argparse.Action
    value: str | None
    must: bool

    @property
    def name(self) -> str:
        return self.action.option_strings[-1] if self.action.option_strings else self.action.dest

    def words(self, out: Path) -> list[str]:
        """The command line, the value in the place of the one that is there, if there is one."""
        words, value = self.command.words(out), [] if self.value is None else [self.value]
        parser = parser_of(self.command)
        positionals = [other for other in parser._actions if not other.option_strings]
        if self.action.option_strings:
            flag = self.name if self.value is None else f"{self.name}={self.value}"
            takes_all = any(other.nargs == argparse.REMAINDER for other in positionals)  # that follows
            return [flag, *words] if takes_all else [*words, flag]
        # A word that names a file, after that of the subcommand where there is one.
        first = 1 if parser.prog.endswith(f" {words[0]}") else 0
        places = [place for place in range(first, len(words)) if not words[place].startswith("-")]
        place = places[[other.dest for other in positionals].index(self.action.dest)]
        return words[:place] + value + words[place + 1 :]


def _values(action: argparse.Action) -> Iterator[tuple[str | None, bool]]:
    """(value, whether it must be refused)."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        yield "1", True
        return
    kind: Any = action.type
    if kind in (int, float):
        for value in NOT_NUMBERS:
            whole = kind is float and value in ("1e20", str(10**20), str(-(10**20)), str(2**63), "9" * 5000)
            yield value, not whole
        for value in EXTREME:
            huge = value in (str(10**9), str(2**62)) and action.dest in LONG_WORK
            if not huge:
                yield value, kind is int and "e" in value
    elif action.dest in OUTPUTS:
        for value in NO_OUTPUTS:
            yield value, True
    elif kind is Path:
        for value in NO_INPUTS:
            yield value, value == ""  # others matter only where they are read
    else:
        yield "", True
        listed = bool(action.choices or vars(action).get("setting", {}).get("choices"))
        for value in ("no such thing", *(() if listed else ODD_TEXTS)):
            yield value, listed
    if action.option_strings:
        yield None, True  # without its value


class BadFlags:
    """The cases, in the folder of inputs."""

    def __init__(self, inputs: Path, scratch: Path) -> None:
        self.inputs, self.scratch = inputs, scratch

    def cases(self) -> Iterator[BadFlag]:
        seen = set()
        for command in COMMANDS.values():
            for action in parser_of(command)._actions:
                hidden = action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction)
                # A flag of several command lines of one command is attacked once.
                first = command.arguments.split()[0]
                key = (command.main, "" if first.startswith("-") else first, action.dest)
                if hidden or key in seen:
                    continue
                seen.add(key)
                for value, must in _values(action):
                    yield BadFlag(command, action, value, must)
            yield BadFlag(command, argparse.Action(["--no_such_flag"], "none"), "1", True)

    def run(self, case: BadFlag) -> Outcome:
        out = self.scratch / "flags" / str(random.getrandbits(60))

        def no_work(*_: Any) -> None:
            raise SystemExit(0)

        def read_flags(*arguments: Any) -> None:
            no_work(scripts.benchmarking.read_config(*arguments))

        # What follows the flags of these takes minutes, or never ends.
        module = sys.modules[case.command.main.__module__]
        starts = ("train_and_judge", "run_stages", "Suite", "submit", "run_here", "serve")
        replaced = {"read_config": read_flags} | dict.fromkeys(starts, no_work)
        with contextlib.ExitStack() as stack:
            for name in replaced.keys() & vars(module).keys():
                stack.enter_context(patched(module, name, replaced[name]))
            ended = call(case.command.main, case.words(out), self.inputs, LIMIT_S)
        kind, said = judge(ended, lambda: not case.must and case.command.sound(ended.out))
        if case.must and kind == Kind.REFUSED and ended.status != 2:
            kind = Kind.WRONG  # it was noticed, but not before work
        shown = "nothing" if case.value is None else repr(case.value[:40])
        return Outcome(GROUP, f"{case.command.name}: {case.name} {shown}", kind, said)


def add_odd_files(inputs: Path) -> None:
    """What NO_INPUTS and NO_OUTPUTS name beside what every machine has."""
    import os

    os.mkfifo(inputs / "pipe")
    (inputs / "link_to_itself").symlink_to("link_to_itself")


def share_of(cases: list[Any], wanted: int, seed: int = 0) -> list[Any]:
    """So many of the cases, the same every time."""
    return cases if len(cases) <= wanted else random.Random(seed).sample(cases, wanted)
