"""One worker under torchrun: runs a script (main_lpd.py) here; writes its process id and exit status to files."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

from scripts.cli import supervise
from util.signals import die_with_parent, exit_status


def _exit(number: int, frame: FrameType | None) -> None:
    """For signals that come before the script has handlers of its own: there is nothing to save yet."""
    supervise.ignore_stop_signals()
    sys.exit(exit_status(number))


def main() -> None:
    die_with_parent()
    report = Path(os.environ[supervise.STATUS_FOLDER], os.environ["LOCAL_RANK"])
    partial = report.with_suffix(".partial")

    def write(suffix: str, number: int) -> None:
        partial.write_text(str(number))
        partial.replace(report.with_suffix(suffix))

    sys.argv = sys.argv[1:]
    status = 1
    try:
        for number in supervise.STOP_SIGNALS:
            signal.signal(number, _exit)
        write(".pid", os.getpid())
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status not in supervise.TOLD_TO_EXIT:
            raise
    finally:
        supervise.ignore_stop_signals()
        write(".status", status)
    # To torchrun the status is 0 here: any other would make it end the other workers.


if __name__ == "__main__":
    main()
