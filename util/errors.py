"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Bad input from the user: one clear sentence that names the value and what would be right.

    Command-line programs print the sentence and exit with status 2 (:func:`util.cli.exit_on_user_error`); library
    callers see an ordinary ``ValueError``.
    """
