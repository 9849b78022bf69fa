"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# These say nothing about what is in the file, which may be whole.
UNREACHABLE = (
    errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT,
)  # fmt: skip


class UserError(ValueError):
    """Bad input from the user: one clear sentence that names the value and what would be right.

    Command-line programs print the sentence and exit with status 2 (:func:`util.cli.exit_on_user_error`); library
    callers see an ordinary ``ValueError``.
    """


def refuse(problems: Sequence[str], heading: str = "") -> None:
    """Raise one UserError for all that is wrong at once, each in a sentence of its own; nothing where nothing is.

    Args:
        heading: what the list is headed by, where there are several, after their number.
    """
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} errors{heading}:", *problems]))


def reason_of(error: Exception) -> str:
    """The first sentence of an exception's message, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")


@contextlib.contextmanager
def about(path: str | Path, remedy: str = "") -> Iterator[None]:
    """Let the UserErrors of a block name the file that they are about, and what to do about it."""
    try:
        yield
    except UserError as error:
        text = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise UserError(f"{text} {remedy}".strip()) from None


@contextlib.contextmanager
def reading(what: str, path: str | Path) -> Iterator[None]:
    """Turn whatever a damaged file makes of its readers into a UserError that names ``what``, the file and the reason.

    Raises:
        UserError: if there is no such file, it can't be read, or the block fails. One raised in the block is passed on
            as it is.
        OSError: for a full disk and for another file, where the block writes something.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        _refuse_unreachable(what, path, error)
        raise UserError(f"{what} {path} does not exist.") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{what} {path} is not a file.")
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the kind depends on where the damage is
        if isinstance(error, OSError) and (error.errno in DISK_FULL or _is_of_another(error, path)):
            raise
        _refuse_unreachable(what, path, error)
        reason = reason_of(error)
        message = f"{what} {path} is truncated or damaged or not plain data: it is not readable ({reason})."
        raise UserError(message) from None


def _refuse_unreachable(what: str, path: str | Path, error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in UNREACHABLE:
        raise UserError(f"{what} {path} can't be read: {error.strerror}.") from None


def _is_of_another(error: OSError, path: str | Path) -> bool:
    return isinstance(error.filename, str) and Path(error.filename) != Path(path)
