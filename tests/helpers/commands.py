"""Commands called as a user calls them, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from util.cli import exit_on_user_error

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"


def run(main: Callable[[], None], *arguments: object) -> int:
    """Exit status of a command called in this process."""
    before = sys.argv
    sys.argv = ["command", *map(str, arguments)]
    try:
        exit_on_user_error(main)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
