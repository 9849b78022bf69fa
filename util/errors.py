"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input from the user: one clear sentence that names the value and what would be right.

    Command-line programs print the sentence and exit with status 2 (see :func:`exit_on_user_error`); library callers
    see an ordinary ``ValueError``.
    """


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run ``main``; a :class:`UserError` becomes one line on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        main()
    except UserError as error:
        # A DataLoader worker's exception arrives with its traceback as the message; the sentence is at the end.
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
