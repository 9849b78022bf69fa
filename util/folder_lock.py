"""One process at a time in an output folder: two would write over each other's files."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path

from util.errors import UserError
from util.files import remove_temporary_files

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


class FolderLock:
    """Holds a folder for one process until the `with` block is left or the process dies, even by a signal.

    A record lock, because network file systems have it and child processes do not inherit it. At the end its file is
    removed, and the folder too if it was made here and nothing else came into it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = False
        self._file: int | None = None

    def acquire(self) -> None:
        """Make the folder and take it, before looking at what is in it: another process may just be finishing.

        Removes what killed processes were writing.

        Raises:
            UserError: if another process has it, or it can't be made.
        """
        if self._file is None:
            self._take()
            if self._file is not None:
                remove_temporary_files(self._folder)

    def _take(self) -> None:
        path = self._folder / LOCK_FILE
        while True:
            self._made = self._made or not self._folder.exists()
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"the output folder {self._folder} can't be made: {error.strerror}.") from None
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                self._lock(self._file)
                if os.path.samestat(os.fstat(self._file), os.stat(path)):
                    return
            except FileNotFoundError:
                pass
            except OSError as error:
                if path.is_symlink() or not path.parent.is_dir():
                    raise UserError(f"{path} can't be made: {error.strerror}; remove what is there.") from None
                logger.warning("%s can't be locked (%s); start nothing else that writes there", self._folder, error)
                self._close()
                return
            self._close()  # of a process that has just removed the file, or the folder

    def _lock(self, file: int) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._close()
            raise UserError(
                f"another process is writing to {self._folder}; wait for its end or name another folder."
            ) from None

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            (self._folder / LOCK_FILE).unlink(missing_ok=True)
        self._close()
        if self._made:
            with contextlib.suppress(OSError):  # not empty
                self._folder.rmdir()
