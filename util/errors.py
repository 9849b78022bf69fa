"""The one exception that stands for a user's mistake, and how programs end with it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Bad input from the user: one clear sentence that names the value and what would be right.

    Command-line programs print the sentence and exit with status 2 (see :func:`exit_on_user_error`); library callers
    see an ordinary ``ValueError``.
    """


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
