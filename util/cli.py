"""What all commands share: flags from configurations, ``--help``, and how a command ends on an error."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field
from typing import Any, NoReturn, TypeVar

from util.config import parts_of, settings_of, value_type
from util.errors import DISK_FULL, UserError, reason_of

C = TypeVar("C")


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, unless it is none, off, or explained in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        unspoken = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if unspoken or "(default:" in text or action.required:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, once for all processes, without the list of all flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **{"formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help explains the flags.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, without empty texts, which would be paths to the working directory, and absurd numbers."""
        words = sys.argv[1:] if args is None else list(args)
        for before, word in itertools.pairwise(["", *words]):
            if not word.strip() or (word.startswith("--") and word.endswith("=")):
                self.error(f"{word.strip(' =') or before or 'a word'} is given an empty text")
        namespace, rest = super().parse_known_args(words, namespace)
        for name, value in vars(namespace).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not -(2**63) <= number < 2**63:
                    self.error(f"--{name} is a number of more than 64 bits")
        return namespace, rest

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


class _Unused(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, flag: str | None = None
    ) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {flag} of the published code is not used here: {self.const}.", file=sys.stderr)


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
    group.add_argument(f"--{field.name}", *given["aliases"], dest=field.name, **options)


def _flag_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same for argparse, which shows the sentence of no other exception."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None

    return convert


def from_args(cls: type[C], args: argparse.Namespace, **given: Any) -> C:
    """The configuration that flags describe, its parts included.

    Args:
        given: values of settings and parts that are no flags.

    Raises:
        UserError: for a setting out of its range.
    """
    values = {field.name: getattr(args, field.name) for field in settings_of(cls) if hasattr(args, field.name)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    parts: dict[str, Any] = {
        field.name: from_args(kind, args) for field, kind in parts_of(cls) if field.name not in given
    }
    return cls(**values | parts | given)


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run ``main``; what ends it early becomes one line on stderr and an exit status.

    A :class:`UserError` exits with 2; numbers that are no longer finite, a full disk, a file that can't be written and
    too little memory with 1; Ctrl-C with 130. Of several processes with the same line only one prints it.
    """
    try:
        main()
    except (UserError, FloatingPointError) as error:
        # A DataLoader worker's exception arrives with its traceback as the message; the sentence is at the end.
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()
        _say_once(f"error: {sentence}")
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except OSError as error:  # what is not of a file is a defect of the program
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
