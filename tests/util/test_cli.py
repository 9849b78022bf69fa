"""How commands read their flags, and how they end on an error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as torch_dist

from util.cli import Parser, exit_on_user_error
from util.config import setting
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


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("no number"), KeyError("x")])
def test_defects_keep_their_traceback(error: Exception) -> None:
    """Guards against hiding them behind a sentence about the machine."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_on_user_error(fail)


@dataclass(frozen=True)
class Command:
    output: Path = setting(Path("here"), "a path")
    name: str = setting("", "a text")
    counts: tuple[int, ...] = setting((1,), "numbers")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", ""], "--output is given an empty text"),
        (["--output="], "--output is given an empty text"),
        (["--name", " "], "--name is given an empty text"),
        (["--counts", "1", str(2**63)], "--counts is a number of more than 64 bits"),
        (["--counts", "-9223372036854775809"], "--counts is a number of more than 64 bits"),
    ],
)
def test_empty_texts_and_absurd_numbers_are_refused(words: list[str], sentence: str) -> None:
    """Guards against writing into the working directory, which an empty path is, and numbers that torch can't hold."""
    parser = Parser()
    parser.add_config(Command)
    assert parser.parse_args(["--counts", "1", str(2**63 - 1)]).counts == [1, 2**63 - 1]
    with pytest.raises(UserError, match=sentence):
        parser.parse_args(words)
