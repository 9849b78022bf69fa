"""Logging: rank 0 speaks, the other ranks only warn; metrics go to a JSONL file with units in the names."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import TracebackType


def setup_logging(rank: int = 0) -> None:
    """Log to stderr: everything from INFO on rank 0, warnings and errors (with the rank) elsewhere."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )


class MetricsWriter:
    """Appends one JSON object per line to ``path``; a no-op when ``path`` is None (ranks other than 0)."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else open(path, "a", buffering=1)  # noqa: SIM115 - closed in __exit__

    def write(self, **values: float | int | str) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
