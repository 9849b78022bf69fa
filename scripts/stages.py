"""Work in stages: a finished stage is not run again, and a time limit ends the work where it can be resumed."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import atomic_write, write_json
from util.signals import REQUEUE_STATUS

# Exit statuses of a command stopped by SIGTERM: it saved, or had no handler; what it finished is on the disk.
STOPPED = (REQUEUE_STATUS, -signal.SIGTERM)


class OutOfTime(Exception):
    """The time limit has come, at a point from which the same command resumes."""


class Clock:
    """The time limit of this call, in seconds from now; None for no limit."""

    def __init__(self, limit: float | None = None) -> None:
        self._end = None if limit is None else time.monotonic() + limit

    def left(self) -> float | None:
        """Seconds left, not below 0; None without a limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def check(self, what: str) -> None:
        """Raise OutOfTime, naming what comes next, if no time is left."""
        if self.left() == 0.0:
            raise OutOfTime(f"time limit reached before {what}")


class Stages:
    """The stages of one output folder; ``stages/<name>.json`` says what ran, how long, and whether it finished."""

    def __init__(self, out: Path, clock: Clock) -> None:
        self.folder, self.clock = out / "stages", clock

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far, over all calls, in the order they were begun."""
        states = [(path.stem, json.loads(path.read_text())) for path in self.folder.glob("*.json")]
        return {name: state["seconds"] for name, state in sorted(states, key=lambda pair: pair[1]["begun"])}

    def run(self, name: str, action: Callable[[], None], command: str, always: bool = False) -> None:
        """Run ``action`` unless it finished before under the same ``command``; record its time in any case.

        Args:
            always: run it even then, because it knows itself what is done.

        Raises:
            OutOfTime: if no time is left to begin it, or from ``action``.
        """
        path = self.folder / f"{name.replace(' ', '_')}.json"
        state: dict[str, Any] = {"command": command, "seconds": 0.0, "finished": False, "begun": time.time()}
        if path.exists():
            before = json.loads(path.read_text())
            state = before if before["command"] == command else state | {"begun": before["begun"]}
        if state["finished"] and not always:
            print(f"== {name}: done before", flush=True)
            return
        self.clock.check(f"the stage '{name}'")
        print(f"\n== {name}\n$ {command}", flush=True)
        start = time.monotonic()
        state["finished"] = False
        try:
            action()
            state["finished"] = True
        finally:
            state["seconds"] = round(state["seconds"] + time.monotonic() - start, 3)
            write_json(path, state)
        print(f"== {name}: {state['seconds']:.0f} s", flush=True)

    def command(self, name: str, *words: str | Path, output: Path | None = None, stoppable: bool = False) -> None:
        """Run ``python WORDS`` as a stage.

        Args:
            output: file for the command's standard output, written when it succeeds.
            stoppable: whether the command saves on SIGTERM and resumes when run again. Others run to their end even
                beyond the time limit, since their work would be lost.

        Raises:
            UserError: if the command fails.
            OutOfTime: if it was stopped, or no time was left to begin it.
        """
        arguments = [str(word) for word in words]

        def action() -> None:
            process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE if output else None)
            try:
                printed, _ = process.communicate(timeout=self.clock.left() if stoppable else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                printed, _ = process.communicate()
                if process.returncode in STOPPED:
                    raise OutOfTime(f"time limit reached in the stage '{name}', which can be resumed") from None
            except KeyboardInterrupt:
                process.wait()  # it got the signal too and may be saving
                raise
            if process.returncode:
                raise UserError(
                    f"the stage '{name}' ended with status {process.returncode}; run the same command again to resume."
                )
            if output:
                with atomic_write(output) as file:
                    file.write(printed)

        self.run(name, action, shlex.join(["python", *arguments]))
