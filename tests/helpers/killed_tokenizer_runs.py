"""Trains a small tokenizer again and again and kills it at random moments; started by a test.

Every run is forked from this process, which has torch imported but has computed nothing, so that a start costs
milliseconds. Prints one line of JSON: how many runs were killed, how many of them while a file was being written, and
which finished trainings ended otherwise than the uninterrupted one.

    python tests/helpers/killed_tokenizer_runs.py FOLDER KILLS
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from engine.tokenizer_training import trainer
from tests.helpers.tokenizer_case import assert_same, train_full

MOMENTS = 70  # about as many as a whole training has, at which it may die


def count_down(left: int) -> Callable[[], None]:
    """What kills this process when it is called for the ``left``-th time."""
    moments = iter(range(left - 1, -1, -1))

    def moment() -> None:
        if next(moments, -1) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return moment


def before(call: Callable[..., Any], moment: Callable[[], None]) -> Callable[..., Any]:
    def replaced(*args: Any, **kwargs: Any) -> Any:
        moment()
        return call(*args, **kwargs)

    return replaced


def save_in_halves(content: Any, file: Any, moment: Callable[[], None]) -> None:
    """As torch.save, with a moment to die at half of the file."""
    whole = io.BytesIO()
    original_save(content, whole)
    data = whole.getvalue()
    for half in (data[: len(data) // 2], data[len(data) // 2 :]):
        file.write(half)
        file.flush()
        moment()


original_save = torch.save


def train(folder: Path, life: int) -> None:
    """Until the end, or until as many steps, measurements and halves of files as ``life`` says have been begun."""
    moment = count_down(life)
    torch.set_num_threads(1)
    trainer._PLAIN = 0.25
    for name in ("forward", "evaluate", "save_torch", "save_tokenizer", "save_png", "write_json"):
        setattr(trainer, name, before(getattr(trainer, name), moment))
    vars(torch)["save"] = partial(save_in_halves, moment=moment)
    vars(os)["replace"] = before(os.replace, moment)
    train_full(folder)


def in_a_child(folder: Path, life: int) -> int:
    """The signal that ended it, 0 for none."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            train(folder, life)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, (folder.parent / "log.txt").read_text()
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main(root: Path, kills: int) -> None:
    root.mkdir(parents=True)
    assert in_a_child(root / "whole", 10**6) == 0
    killed, runs, writing, wrong = 0, 0, 0, []
    generator = random.Random(0)
    while killed < kills:
        folder = root / f"run{runs}"
        while in_a_child(folder, generator.randint(1, MOMENTS)):
            killed += 1
            writing += any(folder.glob(".*.tmp"))
        runs += 1
        try:
            assert_same(root / "whole", folder)
        except AssertionError:
            wrong.append(folder.name)
    print(json.dumps({"killed": killed, "runs": runs, "in_a_write": writing, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
