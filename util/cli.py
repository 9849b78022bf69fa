"""What all commands share: flags from configurations, ``--help``, and how a command ends on an error."""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import select
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from util.config import parts_of, problems_of, settings_of, value_type
from util.errors import DISK_FULL, UserError, reason_of, refuse

C = TypeVar("C")

_INVALID = object()  # stands for a value that could not be read


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, unless it is none, off, or explained in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        unspoken = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if unspoken or "(default:" in text or action.required:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Says all that is wrong with a command line, once for all processes, without the list of all flags.

    Args:
        problems: where a command among several (``add_subparsers``) collects them with its parent.
    """

    def __init__(self, *, problems: list[str] | None = None, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **{"formatter_class": HelpFormatter, **options})
        self._is_command, self._problems = problems is not None, [] if problems is None else problems
        self._waived: list[argparse.Action] = []

    def add_subparsers(self, **options: Any) -> Any:
        return super().add_subparsers(**{"parser_class": partial(type(self), problems=self._problems), **options})

    def error(self, message: str) -> NoReturn:
        """Where parsing can't go on; raises UserError for this and all that was found before."""
        self._problems.append(f"{message.removeprefix('argument ')}.")
        self._refuse()
        raise AssertionError

    def _refuse(self) -> None:
        problems = self._problems[:]
        self._problems.clear()
        if len(problems) == 1:
            raise UserError(f"{problems[0].rstrip('.')}; --help explains the flags.")
        refuse(problems, " on the command line (--help explains the flags)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; UserError for all flags that don't exist, are missing, or whose values are out of range."""
        self._problems.clear()
        parsed, unknown = self.parse_known_args(args, namespace)
        self._problems += self._unknown(unknown)
        self._refuse()
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        if not self._is_command:
            self._problems += _empty_texts(words)
        # argparse would stop at a required flag that is missing, before it sees those that don't exist.
        self._waived = [action for action in self._actions if action.required and action.option_strings]
        self._require(False)
        try:
            parsed, unknown = super().parse_known_args(words, namespace)
        finally:
            self._require(True)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if action in self._waived and value is None:
                self._problems.append(f"{action.option_strings[0]} is missing.")
            elif hasattr(action, "setting"):
                values = value if isinstance(value, list | tuple) else [value]
                readable = [one for one in values if one is not _INVALID]
                self._problems += problems_of(action.option_strings[0], readable, action.setting)
        if self._is_command:
            self._problems += self._unknown(unknown)
            unknown = []
        return parsed, unknown

    def _require(self, required: bool) -> None:
        for action in self._waived:
            action.required = required

    def format_help(self) -> str:
        self._require(True)  # --help acts in the middle of parsing
        return super().format_help()

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        name = action.option_strings[0] if action.option_strings else action.metavar or action.dest
        try:
            value = super()._get_value(action, arg_string)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                self._problems.append(f"{name} is a number of more than 64 bits.")
                return _INVALID
            return value
        except argparse.ArgumentError as error:
            kinds: dict[Any, str] = {int: "a whole number", float: "a number"}
            if action.type in kinds:
                self._problems.append(f"{name} is {arg_string!r}; it must be {kinds[action.type]}.")
            else:
                self._problems.append(f"{name}: {error.message.rstrip('.')}.")
            return _INVALID

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices or value is _INVALID:
            return
        name = action.option_strings[0] if action.option_strings else action.metavar or action.dest
        choices = [str(choice) for choice in action.choices]
        message = f"{name} is {value!r}; choose one of {', '.join(choices)}{_meant(value, choices)}"
        if isinstance(action, argparse._SubParsersAction):
            self.error(message)
        self._problems.append(f"{message}.")

    def _unknown(self, words: list[str]) -> list[str]:
        """A sentence for each of the words that no flag takes; values behind flags that don't exist go with them."""
        spoken = [name for act in self._actions if act.help != argparse.SUPPRESS for name in act.option_strings]
        problems, follows = [], False
        for word in words:
            is_flag = word.startswith("-") and not word[1:2].isdigit()
            if is_flag:
                name = word.partition("=")[0]
                problems.append(f"there is no flag {name}{_meant(name, spoken)}.")
            elif not follows:
                problems.append(f"{word!r} belongs to no flag.")
            follows = is_flag or follows
        return problems

    def add_config(self, cls: type, defaults: Mapping[str, Any] | None = None, skip: Collection[str] = ()) -> None:
        """Add a flag for every setting of a configuration; those of its parts under headings.

        Args:
            defaults: for settings whose default is another here.
            skip: settings that are no flags here.
        """
        self._add_config(self, cls, defaults or {}, skip)

    def _add_config(
        self, group: argparse._ActionsContainer, cls: type, defaults: Mapping[str, Any], skip: Collection[str]
    ) -> None:
        for field in settings_of(cls):
            # A setting that several parts have is one flag.
            if field.name not in skip and f"--{field.name}" not in self._option_string_actions:
                _add_flag(group, cls, field, defaults.get(field.name, field.default))
        for field, kind in parts_of(cls):
            title, description = field.metadata["title"], field.metadata["description"]
            inner = self.add_argument_group(title, description or None) if title else group
            self._add_config(inner, kind, defaults, skip)

    def add_unused(self, *flags: str, instead: str, takes_value: bool = True) -> None:
        """Accept flags of the published code that mean nothing here; using one prints what takes its place."""
        nargs = 1 if takes_value else 0
        self.add_argument(
            *flags, action=_Unused, nargs=nargs, dest=argparse.SUPPRESS, const=instead, help=argparse.SUPPRESS
        )


def _empty_texts(words: Sequence[str]) -> list[str]:
    """A sentence for each empty word, which as a path would be the working directory."""
    return [
        f"{word.strip(' =') or before or 'a word'} is given an empty text."
        for before, word in itertools.pairwise(["", *words])
        if not word.strip() or (word.startswith("-") and "=" in word and not word.partition("=")[2].strip())
    ]


class _Unused(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, flag: str | None = None
    ) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {flag} of the published code is not used here: {self.const}.", file=sys.stderr)


def _meant(word: str, names: Sequence[str]) -> str:
    """What to add to a message about a word that is none of the names; nothing where none is like it."""
    like = [name for name in names if len(word) > 2 and name.startswith(word)] or get_close_matches(word, names, 1)
    return f" (did you mean {like[0]}?)" if like else ""


def _add_flag(group: argparse._ActionsContainer, cls: type, field: Field[Any], default: Any) -> None:
    kind, many = value_type(cls, field)
    given = field.metadata
    options: dict[str, Any] = {"help": given["help"].replace("%", "%%")}
    options |= {"required": True} if default is MISSING else {"default": default}
    if given["choices"]:
        options["metavar"] = f"{{{','.join(given['choices'])}}}"
    if many:
        options["nargs"] = "+"
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = kind if given["parse"] is None else _flag_type(given["parse"])
    action = group.add_argument(f"--{field.name}", *given["aliases"], dest=field.name, **options)
    action.setting = given  # type: ignore[attr-defined]  # the parser checks the range


def _flag_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same for argparse, which shows the sentence of no other exception."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None

    return convert


def path_ending_in(*suffixes: str) -> Callable[[str], Path]:
    """The type of a flag for a file with one of these suffixes."""

    def path(text: str) -> Path:
        if not text.endswith(suffixes):
            raise argparse.ArgumentTypeError(f"{text} must end in {', '.join(suffixes)}")
        return Path(text)

    return path


def from_args(cls: type[C], args: argparse.Namespace, **given: Any) -> C:
    """The configuration that flags describe, its parts included.

    Args:
        given: values of settings and parts that are no flags.

    Raises:
        UserError: for settings out of their range, or that contradict each other, of all parts at once.
    """
    values = {field.name: getattr(args, field.name) for field in settings_of(cls) if hasattr(args, field.name)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    parts: dict[str, Any] = {}
    problems = []
    for field, kind in parts_of(cls):
        if field.name not in given:
            try:
                parts[field.name] = from_args(kind, args)
            except UserError as error:
                problems.append(str(error))
    refuse(problems, " on the command line")
    return cls(**values | parts | given)


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run ``main``; what ends it early becomes one line on stderr and an exit status.

    A :class:`UserError` exits with 2; numbers that are no longer finite, a full disk, a file that can't be written and
    too little memory with 1; Ctrl-C with 130; without a line, and with 141, what prints where nobody reads any more,
    as with ``| head``. Of several processes with the same line only one prints it.
    """
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (UserError, FloatingPointError) as error:
        # A DataLoader worker's exception arrives with its traceback as the message; the sentence is at the end.
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()
        _say_once(f"error: {sentence}")
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except OSError as error:  # what is not of a file is a defect of the program
        if error.errno == errno.ENAMETOOLONG:
            _say_once(f"error: the path {str(error.filename)[:60]}… is longer than this system allows.")
            raise SystemExit(2) from None
        if error.errno not in DISK_FULL and error.filename is None:
            raise
        problem = "the disk is full" if error.errno in DISK_FULL else f"{error.filename} can't be read or written"
        _say_once(f"error: {problem} ({error}).")
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _say_once(f"error: there is not enough memory ({reason_of(error)}); try a smaller batch.")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say_once("interrupted")
        raise SystemExit(130) from None


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads. Flushing would not tell: what failed may be left nowhere."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # no standard output, or one that is no file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _out_of_memory(error: Exception) -> bool:
    """Whether memory was refused, by whatever allocates it: torch has no exception of its own for a CPU's."""
    signs = ("can't allocate memory", "out of memory", "Storage size calculation overflowed", "bad_alloc")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _say_once(line: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from util.dist import said_already  # needs torch, which other programs do without

        if said_already(line):
            return
    print(line, file=sys.stderr)
