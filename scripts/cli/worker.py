"""One worker under torchrun: runs a script (main_lpd.py) in this process and tells the supervisor about it."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

from scripts.cli.supervise import (
    INTERRUPTED,
    REQUEUE,
    STATUS_FOLDER,
    STOP_SIGNALS,
    TOLD_TO_LEAVE,
    ignore_stop_signals,
)


def _leave(number: int, frame: FrameType | None) -> None:
    """Until the script has handlers of its own there is nothing to save."""
    ignore_stop_signals()
    sys.exit(INTERRUPTED if number == signal.SIGINT else REQUEUE)


def main() -> None:
    report = Path(os.environ[STATUS_FOLDER], os.environ["LOCAL_RANK"])
    partial = report.with_suffix(".partial")

    def write(suffix: str, number: int) -> None:
        partial.write_text(str(number))
        partial.replace(report.with_suffix(suffix))

    sys.argv = sys.argv[1:]
    status = 1
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, _leave)
        write(".pid", os.getpid())
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status not in TOLD_TO_LEAVE:
            raise
    finally:
        ignore_stop_signals()
        write(".status", status)
    # The script's status is told; to torchrun any other than 0 were a failure that ends the other workers.


if __name__ == "__main__":
    main()
