"""What all commands share: how they end on an error, and how `--help` shows defaults."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from util.errors import DISK_FULL, UserError


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, unless it is none, off, or explained in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "(default:" in text:
            return text
        return f"{text} (default: %(default)s)"


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run ``main``; what ends it early becomes one line on stderr and an exit status.

    A :class:`UserError` exits with 2, numbers that are no longer finite and a full disk with 1, Ctrl-C with 130. Of
    several processes with the same line only one prints it.
    """
    try:
        main()
    except (UserError, FloatingPointError) as error:
        # A DataLoader worker's exception arrives with its traceback as the message; the sentence is at the end.
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()
        _say_once(f"error: {sentence}")
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _say_once(f"error: the disk is full ({error}).")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say_once("interrupted")
        raise SystemExit(130) from None


def _say_once(line: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from util.dist import said_already  # needs torch, which other programs do without

        if said_already(line):
            return
    print(line, file=sys.stderr)
