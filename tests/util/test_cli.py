"""How commands read their flags, and how they end on an error."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as torch_dist

from tests.helpers.commands import ROOT, run
from util.cli import Parser, exit_on_user_error, from_args
from util.config import check, part, setting
from util.errors import UserError


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("--x is 1."), 2), (FloatingPointError("nan"), 1), (OSError(28, "full"), 1), (KeyboardInterrupt(), 130)],
)
def test_the_same_sentence_is_printed_by_one_process_of_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    """Eight GPUs used to say everything eight times; but what only one of them knows must be said."""

    def fail() -> None:
        raise error

    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(fail)
        assert caught.value.code == status
    assert len(capsys.readouterr().err.splitlines()) == 1
    error.args = ("something else",)
    monkeypatch.delenv("MASTER_PORT")  # nobody to ask: better twice than never
    with pytest.raises(SystemExit):
        exit_on_user_error(fail)
    assert len(capsys.readouterr().err.splitlines()) == 1


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = setting(0.5, "a rate", at_least=0, below=1)
    low: int = setting(1, "at most --high")
    high: int = setting(2, "at least --low")

    def __post_init__(self) -> None:
        check(self)
        if self.low > self.high:
            raise UserError(f"--low is {self.low}; it must be at most --high.")


@dataclass(frozen=True, kw_only=True)
class Other:
    even: int = setting(2, "even")

    def __post_init__(self) -> None:
        if self.even % 2:
            raise UserError(f"--even is {self.even}.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: str = setting(help="needed")
    epochs: int = setting(1, "passes", at_least=1)
    kind: str = setting("one", "a kind", choices=("one", "two"))
    many: tuple[int, ...] = setting((1,), "some", at_least=1)
    inner: Inner = part("inner")
    other: Other = part("other")


def parser() -> Parser:
    parser = Parser(prog="test")
    parser.add_config(Outer)
    parser.add_argument("--shape", choices=("round", "square"))
    return parser


def refusal(words: str) -> list[str]:
    """The lines of the message about a command line."""
    with pytest.raises(UserError) as caught:
        from_args(Outer, parser().parse_args(words.split()))
    return str(caught.value).splitlines()


def test_all_errors_of_a_command_line_are_said_at_once() -> None:
    heading, *problems = refusal("--ephocs 3 4 --epochs 0 --rate x --kind three --shape rund --epho=5")
    assert heading == "7 errors on the command line (--help explains the flags):"
    assert sorted(line.strip() for line in problems) == [
        "--epochs is 0; it must be at least 1.",
        "--kind is 'three'; choose one of one, two.",
        "--path is missing.",
        "--rate is 'x'; it must be a number.",
        "--shape is 'rund'; choose one of round, square (did you mean round?).",
        "there is no flag --epho (did you mean --epochs?).",
        "there is no flag --ephocs (did you mean --epochs?).",
    ]
    heading, *problems = refusal("--path x --many 2 x 0")
    assert problems == ["  --many is 'x'; it must be a whole number.", "  --many is 0; it must be at least 1."]
    # What contradicts each other is said where single values are right, of all parts at once.
    heading, *problems = refusal("--path x --low 3 --even 3")
    assert heading == "2 errors on the command line:"
    assert problems == ["  --low is 3; it must be at most --high.", "  --even is 3."]


def test_a_single_error_is_one_line() -> None:
    unknown = "there is no flag --epoch (did you mean --epochs?); --help explains the flags."
    assert refusal("--path x --epoch 3") == [unknown]
    assert refusal("--path x stray") == ["'stray' belongs to no flag; --help explains the flags."]
    assert refusal("--path") == ["--path: expected one argument; --help explains the flags."]


def test_required_flags_are_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit):
            parser().parse_args(["--help"])
        assert "--path PATH [--epochs EPOCHS]" in " ".join(capsys.readouterr().out.split())
    assert parser().parse_args(["--path", "x"]).path == "x"


COMMANDS = ["main_lpd", "main_cache", "orders.__main__", "engine.hub.__main__", "engine.classifier", "engine.metrics",
            "engine.evaluation.results_table", "engine.evaluation.compare", "tokenizers.train", "scripts.demo",
            "scripts.gpu_suite", "scripts.benchmark_latency", "scripts.likelihood", "scripts.find_schedule",
            "scripts.generate", "scripts.edit", "scripts.plots", "experiments.cifar10.run",
            "experiments.produce.run"]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_prints_its_whole_usage_on_a_wrong_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(name)
    main: Callable[[], None] = module.EXPERIMENT.main if name.startswith("experiments") else module.main
    command = {
        "orders.__main__": ["stats"],
        "engine.hub.__main__": ["push", "a", "b"],
        "engine.evaluation.results_table": ["x"],
        "scripts.plots": ["loss", "x"],
    }.get(name, [])
    assert run(main, *command, "--no_such_flag") == 2
    said = capsys.readouterr().err
    assert "there is no flag --no_such_flag" in said
    assert "usage" not in said


def test_a_wrong_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    hub = importlib.import_module("engine.hub.__main__").main
    assert run(hub, "downlaod", "all") == 2
    assert "(did you mean download?)" in capsys.readouterr().err
    assert run(hub, "download", "lpd_l_265", "--foce") == 2
    said = capsys.readouterr().err
    assert "(did you mean lpd_l_256?)" in said
    assert "there is no flag --foce" in said


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (PermissionError(13, "Permission denied", "a.json"), "a.json can't be read or written"),
        (MemoryError("Unable to allocate 8 TiB"), "there is not enough memory (Unable to allocate 8 TiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough memory"),
        (
            RuntimeError("CUDA out of memory. You tried"),
            "there is not enough memory (CUDA out of memory)",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(
    capsys: pytest.CaptureFixture[str], error: Exception, sentence: str
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(fail)
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")


def test_a_path_that_is_too_long_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: print((tmp_path / ("d/" * 3000)).is_dir()))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is longer than this system allows" in line
    assert len(line) < 150


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("no number"), KeyError("x")])
def test_defects_keep_their_traceback(error: Exception) -> None:
    """Guards against hiding them behind a sentence about the machine."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_on_user_error(fail)


@dataclass(frozen=True)
class Command:
    output: Path = setting(Path("here"), "a path", aliases=("-o",))
    name: str = setting("", "a text")
    counts: tuple[int, ...] = setting((1,), "numbers")
    rate: float = setting(1.0, "a number", above=0)
    shift: float = setting(0.0, "a number")

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", ""], "--output is given an empty text"),
        (["--output="], "--output is given an empty text"),
        (["-o="], "-o is given an empty text"),
        (["--name= "], "--name is given an empty text"),
        (["--name", " "], "--name is given an empty text"),
        (["--counts", "1", str(2**63)], "--counts is a number of more than 64 bits"),
        (["--counts", "-9223372036854775809"], "--counts is a number of more than 64 bits"),
        (["--rate", "1e300"], r"--rate is 1e\+300; it must be above 0 and at most 1e\+30"),
        (["--rate", "nan"], r"--rate is nan; it must be above 0 and at most 1e\+30"),
        (["--shift=-inf"], r"--shift is -inf; it must be at least -1e\+30 and at most 1e\+30"),
    ],
)
def test_empty_texts_and_absurd_numbers_are_refused(words: list[str], sentence: str) -> None:
    """Guards against writing into the working directory, which an empty path is, and numbers that torch can't hold."""
    parser = Parser()
    parser.add_config(Command)
    assert parser.parse_args(["--counts", "1", str(2**63 - 1)]).counts == [1, 2**63 - 1]
    with pytest.raises(UserError, match=sentence):
        parser.parse_args(words)


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_has_seen_enough_is_no_error(flush: bool) -> None:
    """Guards against a traceback after ``| head``."""
    program = "from util.cli import exit_on_user_error; "
    program += f"exit_on_user_error(lambda: print('a line' * 10**5, flush={flush}))"
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writing)
    assert (found.returncode, found.stderr) == (128 + signal.SIGPIPE, b"")


def test_another_pipe_that_breaks_is_a_defect() -> None:
    """Guards against work that ends in silence."""
    program = "import os; from util.cli import exit_on_user_error; r, w = os.pipe(); os.close(r); "
    program += "exit_on_user_error(lambda: os.write(w, b'x'))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 1
    assert "BrokenPipeError" in found.stderr
