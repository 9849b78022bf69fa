"""Running the experiment's stages: what is finished is not done again, and a time limit ends the work safely."""

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

# Of a stage told to stop: saved, or ended before or without a handler, since what it finished is on the disk already.
STOPPED = (REQUEUE_STATUS, -signal.SIGTERM)


class OutOfTime(Exception):
    """The time limit has come; everything is at a point from which the same command goes on."""


class Clock:
    """The time limit of this call, in seconds from now; None for no limit."""

    def __init__(self, limit: float | None) -> None:
        self._end = None if limit is None else time.monotonic() + limit

    def left(self) -> float | None:
        """Seconds left, not below 0; None without a limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def check(self, what: str) -> None:
        """Raise OutOfTime, naming what comes next, if there is no time left."""
        if self.left() == 0.0:
            raise OutOfTime(f"time limit reached before {what}")


class Stages:
    """The stages of one output folder; ``stages/<name>.json`` says what ran, how long, and whether it finished."""

    def __init__(self, out: Path, clock: Clock) -> None:
        self.out, self.clock = out, clock

    def _marker(self, name: str) -> Path:
        return self.out / "stages" / f"{name.replace(' ', '_')}.json"

    def _state(self, name: str) -> dict[str, Any]:
        path = self._marker(name)
        return json.loads(path.read_text()) if path.exists() else {"command": "", "seconds": 0.0, "finished": False}

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far, over all calls, in the order they were begun."""
        markers = sorted((self.out / "stages").glob("*.json"), key=lambda path: json.loads(path.read_text())["begun"])
        return {path.stem: json.loads(path.read_text())["seconds"] for path in markers}

    def run(self, name: str, action: Callable[[], None], command: str, redo: bool = False) -> None:
        """Run ``action`` unless it finished before under the same ``command``, and record its time either way.

        Args:
            redo: run it in any case, because it knows by itself what is done.

        Raises:
            OutOfTime: if there is no time to begin it, or from ``action``.
        """
        state = self._state(name)
        if state["finished"] and state["command"] == command and not redo:
            print(f"== {name}: done before", flush=True)
            return
        self.clock.check(f"the stage '{name}'")
        print(f"\n== {name}\n$ {command}", flush=True)
        if state["command"] != command:
            state["seconds"] = 0.0
        start, finished = time.monotonic(), False
        begun = state.get("begun", time.time())
        try:
            action()
            finished = True
        finally:
            seconds = round(state["seconds"] + time.monotonic() - start, 3)
            record = {"command": command, "seconds": seconds, "finished": finished, "begun": begun}
            write_json(self._marker(name), record)
        print(f"== {name}: {seconds:.0f} s", flush=True)

    def command(self, name: str, *words: str | Path, output: Path | None = None, stoppable: bool = False) -> None:
        """Run ``python WORDS`` as a stage.

        Args:
            output: file for the command's standard output, written when it succeeds.
            stoppable: whether the command can be ended by SIGTERM and goes on when run again. Others run to their end
                even beyond the time limit, since their work would be lost.

        Raises:
            UserError: if the command fails. OutOfTime: if it was stopped.
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
                    raise OutOfTime(f"time limit reached in the stage '{name}', which can go on") from None
            except KeyboardInterrupt:
                process.wait()  # it got the signal too and may be saving
                raise
            if process.returncode:
                raise UserError(
                    f"the stage '{name}' ended with status {process.returncode}; run the same command again to go on."
                )
            if output:
                with atomic_write(output) as file:
                    file.write(printed)

        self.run(name, action, shlex.join(["python", *arguments]))
