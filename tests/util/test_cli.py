"""How commands read their flags, and how they end on an error."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch.distributed as torch_dist

from tests.helpers.commands import run
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
            "engine.evaluation.results_table", "tokenizers.train", "scripts.demo", "scripts.gpu_suite",
            "scripts.benchmark_latency", "experiments.cifar10.run"]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_prints_its_whole_usage_on_a_wrong_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[], None] = importlib.import_module(name).main
    command = {
        "orders.__main__": ["stats"],
        "engine.hub.__main__": ["push", "a", "b"],
        "engine.evaluation.results_table": ["x"],
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
