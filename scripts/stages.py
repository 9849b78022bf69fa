"""Work in stages: a finished stage is not run again, and a time limit ends the work where it can be resumed.

:func:`train_and_judge` has the stages from images to a trained model, for the demo and the experiment on photographs.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.scoring.features import INCEPTION
from util.errors import UserError, reading
from util.files import atomic_write, write_json
from util.readers import read_json
from util.signals import REQUEUE_STATUS, STOP_SIGNALS, die_with_parent, pass_on_stop_signals

RECORD = "record of stages"
# Exit statuses of a command that a stop signal ended: it saved, or had no handler; what it finished is on the disk.
STOPPED = (REQUEUE_STATUS, *(-number for number in STOP_SIGNALS))


class OutOfTime(Exception):
    """The time limit or a stop signal has come, at a point from which the same command resumes."""


class Stages:
    """The stages of one output folder; ``stages.json`` says what ran, how long, and whether it finished.

    Args:
        time_limit: seconds from now after which nothing is begun; None for no limit.
    """

    def __init__(self, out: Path, time_limit: float | None = None) -> None:
        self.path = out / "stages.json"
        self._end = None if time_limit is None else time.monotonic() + time_limit

    def left(self) -> float | None:
        """Seconds left, not below 0; None without a limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def check(self, what: str) -> None:
        """Raise OutOfTime, naming what comes next, if no time is left."""
        if self.left() == 0.0:
            raise OutOfTime(f"time limit reached before {what}")

    def states(self) -> dict[str, dict[str, Any]]:
        """``command``, ``seconds`` (over all calls) and ``finished`` of every stage, in the order they were begun.

        Raises:
            UserError: if the file is damaged or something else.
        """
        if not self.path.exists():
            return {}
        states: dict[str, dict[str, Any]] = read_json(RECORD, self.path)
        with reading(RECORD, self.path):
            for name, state in states.items():
                kinds = {"command": str, "seconds": float, "finished": bool}
                if not all(isinstance(state[key], kind) for key, kind in kinds.items()):
                    raise ValueError(f"the stage {name!r}")
        return states

    def run(self, name: str, action: Callable[[], None], command: str, always: bool = False) -> None:
        """Run ``action`` unless it finished before under the same ``command``; record its time in any case.

        Args:
            always: run it even then, because it knows itself what is done.

        Raises:
            OutOfTime: if no time is left to begin it, or from ``action``.
        """
        states = self.states()
        state = states.get(name, {"command": None})
        if state["command"] != command:
            state = {"command": command, "seconds": 0.0, "finished": False}
        if state["finished"] and not always:
            print(f"== {name}: done before", flush=True)
            return
        self.check(f"the stage '{name}'")
        print(f"\n== {name}\n$ {command}", flush=True)
        start = time.monotonic()
        state["finished"] = False
        write_json(self.path, states | {name: state})
        try:
            action()
            state["finished"] = True
        finally:
            state["seconds"] = round(state["seconds"] + time.monotonic() - start, 3)
            write_json(self.path, states | {name: state})
        print(f"== {name}: {state['seconds']:.0f} s", flush=True)

    def command(
        self, name: str, *words: str | Path, output: Path | None = None, stoppable: bool = False, always: bool = False
    ) -> None:
        """Run ``python WORDS`` as a stage.

        Args:
            always: as in :meth:`run`.
            output: file for the command's standard output, written when it succeeds.
            stoppable: whether the command saves on SIGTERM and resumes when run again. Others run to their end even
                beyond the time limit, since their work would be lost.

        A stop signal to this process is passed on to it and waited for. It dies with this process, so that a killed one
        is not in the way of the next.

        Raises:
            UserError: if the command fails.
            OutOfTime: if it was stopped, no time was left to begin it, or a stop signal came before it finished.
        """
        arguments = [str(word) for word in words]
        signals: list[int] = []

        def action() -> None:
            process = subprocess.Popen(
                [sys.executable, *arguments], stdout=subprocess.PIPE if output else None, preexec_fn=die_with_parent
            )
            reason = "told to stop"
            with pass_on_stop_signals(process) as came:
                try:
                    try:
                        printed, _ = process.communicate(timeout=self.left() if stoppable else None)
                    except subprocess.TimeoutExpired:
                        reason = "time limit reached"
                        process.send_signal(signal.SIGTERM)
                        printed, _ = process.communicate()
                except KeyboardInterrupt:
                    process.send_signal(signal.SIGTERM)  # a terminal's Ctrl-C has reached it already, another one not
                    process.wait()
                    raise
            signals.extend(came)
            if process.returncode in STOPPED:
                raise OutOfTime(f"{reason} in the stage '{name}', which can be resumed")
            if process.returncode:
                raise UserError(
                    f"the stage '{name}' ended with status {process.returncode}; run the same command again to resume."
                )
            if output:
                with atomic_write(output) as file:
                    file.write(printed)

        self.run(name, action, shlex.join(["python", *arguments]), always)
        if signals:
            raise OutOfTime(f"told to stop in the stage '{name}', which was finished all the same")


TRAINING_STAGES = ("tokenizer", "codes", "classifier", "reference", "floors", "lpd")


def train_and_judge(
    stages: Stages,
    out: Path,
    train: str,
    test: str,
    reference: str,
    common: Sequence[str],
    flags: Mapping[str, Sequence[str]],
    chosen: Collection[str] = TRAINING_STAGES,
    inception: Path | None = None,
    trainings: Mapping[str, Sequence[str]] = MappingProxyType({"lpd": ()}),
    validation: str | None = None,
) -> None:
    """From images to a tokenizer, codes, a classifier as judge, statistics, scores of real images, and an LPD.

    Each is made by an ordinary command of the project, into `out`.

    Args:
        train, test: images, as every command's --data_path takes them.
        reference: images against which others are scored, such as `train` or `test`; `floors/` gets the scores of
            `test` (of `train`, where `test` is the reference) and of what the tokenizer makes of `test`.
        common: flags of all commands.
        flags: further flags of a stage's command, by stage.
        chosen: stages to run.
        inception: its weights; statistics and scores in its features are made as well then.
        trainings: further flags of each LPD training, by the name of its folder.
        validation: images whose loss is measured while an LPD is trained.
    """
    tokenizer, classifier = out / "tokenizer" / "tokenizer.pt", out / "classifier.pt"

    def run(
        stage: str,
        *words: str | Path,
        name: str = "",
        output: Path | None = None,
        stoppable: bool = False,
        more: Sequence[str] = (),
    ) -> None:
        if stage in chosen:
            words = (*words, *common, *flags.get(stage, ()), *more)
            stages.command(name or stage, *words, output=output, stoppable=stoppable)

    run(
        "tokenizer", "-m", "tokenizers.train", "--data_path", train, "--output_dir", tokenizer.parent, stoppable=True
    )  # fmt: skip
    caches = {out / "codes": train} | ({out / "codes_validation": validation} if validation is not None else {})
    for cache, images in caches.items():
        run(
            "codes", "main_cache.py", "--data_path", images, "--vqgan_path", tokenizer, "--cached_path", cache,
            name=cache.name, stoppable=True,
        )  # fmt: skip
    run(
        "classifier", "-m", "engine.classifier", "--data_path", train, "--test_path", test, "--output", classifier
    )  # fmt: skip
    extractors: dict[str, tuple[str | Path, ...]] = {"reference": ("--feature_extractor", classifier)}
    if inception is not None:
        extractors["inception"] = ("--feature_extractor", INCEPTION, "--inception_path", inception)
    floors: dict[str, tuple[str | Path, ...]] = {
        "real": ("--data_path", train if reference == test else test),
        "reconstructed": ("--data_path", test, "--vqgan_path", tokenizer),
    }
    for name, extractor in extractors.items():
        made = out / f"{name}.npz"
        words = ("-m", "engine.metrics", *extractor)
        run("reference", *words, "--data_path", reference, "--output", made, name=f"{name} statistics")
        for floor, shown in floors.items():
            output = out / "floors" / f"{name}_{floor}.json"
            run("floors", *words, *shown, "--reference_statistics", made, name=f"floor {name} {floor}", output=output)
    measured = ("--val_cached_path", str(out / "codes_validation")) if validation is not None else ()
    for name, own in trainings.items():
        run(
            "lpd", "main_lpd.py", "--use_cached", "--cached_path", out / "codes", "--vqgan_path", tokenizer,
            "--output_dir", out / name, *measured, name=name, stoppable=True, more=own,
        )  # fmt: skip
