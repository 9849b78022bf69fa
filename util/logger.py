"""Logging: everything of rank 0, warnings of the others; metrics as JSON lines with units in the names."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from util.files import atomic_write
from util.readers import read_json_lines


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
    for name in ("httpx", "httpx2"):  # the hub's client logs every request
        logging.getLogger(name).setLevel(logging.WARNING)


class MetricsWriter:
    """Appends one JSON object per line to a file; a no-op when `path` is None (ranks other than 0).

    Args:
        resume_step: drop the lines of later steps, which a killed run wrote after its last checkpoint. 0 drops all.
            Damaged lines are put aside.
    """

    def __init__(self, path: Path | None, resume_step: int = 0) -> None:
        self._file = None
        if path is None:
            return
        lines = read_json_lines(path, "step", put_aside=True)
        kept = [line for line in lines if line["step"] <= resume_step]
        with atomic_write(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed in close

    def write(self, **values: float | int | str) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
