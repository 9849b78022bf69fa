"""One process at a time in an output folder: two would write over each other's files."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from types import TracebackType
from typing import TextIO

from util.errors import UserError

logger = logging.getLogger(__name__)

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)


class FolderLock:
    """Holds a folder until the `with` block is left or the process dies, even by a signal.

    A record lock, because network file systems have it and child processes do not inherit it.

    Args:
        purpose: what the folder is used for, in one word for messages.
    """

    def __init__(self, folder: Path, purpose: str) -> None:
        self._folder, self._purpose = folder, purpose
        self._file: TextIO | None = None

    def acquire(self) -> None:
        """Take the folder, if it exists; a second call changes nothing.

        Raises:
            UserError: where another process has it.
        """
        if self._file is not None or not self._folder.is_dir():
            return
        self._file = open(self._folder / NAME, "w")  # noqa: SIM115 - closed when the lock is given back
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise UserError(
                    f"another {self._purpose} is writing to {self._folder}; wait for its end or name another folder."
                ) from None
            logger.warning(
                "%s can't be locked (%s); do not start a second %s there", self._folder, error, self._purpose
            )

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
