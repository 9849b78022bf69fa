"""One process at a time in an output folder: two would write over each other's files."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import TextIO

from util.errors import UserError

logger = logging.getLogger(__name__)

NAME = ".lock"


class FolderLock:
    """Holds a folder for one training until the `with` block is left or the process dies, even by a signal.

    A record lock, because network file systems have it and child processes do not inherit it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def acquire(self) -> None:
        """Take the folder, if it exists; a second call changes nothing. UserError where another process has it."""
        if self._file is not None or not self._folder.is_dir():
            return
        self._file = open(self._folder / NAME, "w")  # noqa: SIM115 - closed when the lock is given back
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another training is writing to {self._folder}; wait for its end or name another folder."
            ) from None
        except OSError as error:
            logger.warning("%s can't be locked (%s); do not start a second training there", self._folder, error)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
