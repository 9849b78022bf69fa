"""Runs a small training again and again and kills it, the way a cluster does; started by tests of engine/training.

Every run is forked from this process, which has torch imported but has computed nothing, so that a start costs
milliseconds. Prints one line of JSON: how many runs were killed, how many of them while a checkpoint was being written,
and which finished runs ended with other weights or losses than the uninterrupted one.

    python tests/helpers/interrupted_runs.py FOLDER WORLD_SIZE KILLS
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch._dynamo

import util.checkpoint
from engine.training.config import TrainConfig
from models import build_model
from models.lpd import LPD, load_weights
from tests.helpers.processes import meeting_place, rank_variables
from tests.helpers.tiny_run import V
from tests.helpers.training_case import SCHEDULES, make_cache, train
from util.checkpoint import LAST, load_checkpoint, load_newest
from util.data.codes import MappedCodes
from util.dist import distributed

EPOCHS, GLOBAL_BATCH = 5, 8  # 25 steps
LONGEST_LIFE = 0.3  # seconds after the first step


def save_slowly(payload: Any, file: Any) -> None:
    """As torch.save, in pieces that reach the disk one by one, so that most kills fall into a write."""
    whole = io.BytesIO()
    original_save(payload, whole)
    data = whole.getvalue()
    for start in range(0, len(data), len(data) // 50):
        file.write(data[start : start + len(data) // 50])
        file.flush()
        os.fsync(file.fileno())


original_save = torch.save


def run_training(cache: Path, folder: Path, started: int) -> None:
    """One process's training, as main_lpd.py would do it: from the newest checkpoint, if there is one."""
    vars(util.checkpoint.torch)["save"] = save_slowly

    class Codes(MappedCodes):
        def get_batch(self, indices: Any) -> Any:
            if self.batches == 1:
                os.write(started, b".")
            self.batches += 1
            return super().get_batch(indices)

        batches = 0
        __getitems__ = get_batch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: LPD = build_model("lpd_debug", img_size=64, class_num=3, vocab_size=V, proj_dropout=0.1)
    with distributed("cpu") as dist:
        newest = load_newest(folder)
        if newest is not None:
            load_weights(model, newest[1]["model"], str(newest[0]))
        config = TrainConfig(
            output_dir=folder, epochs=EPOCHS, batch_size=GLOBAL_BATCH // dist.world_size, lr=1e-2, warmup_epochs=1,
            lr_schedule="cosine", num_workers=0, save_last_steps=2, keep_last=3,
        )  # fmt: skip
        train(model, Codes(cache), SCHEDULES, config, dist, resume=newest[1] if newest else None)


@contextlib.contextmanager
def started(cache: Path, folder: Path, world_size: int) -> Iterator[tuple[list[int], int]]:
    """Process ids, and a pipe that gets a byte when the first step is done."""
    with meeting_place(world_size) as variables:
        pids, first_step = start(cache, folder, world_size, variables)
        yield pids, first_step
        os.close(first_step)


def start(cache: Path, folder: Path, world_size: int, variables: dict[str, str]) -> tuple[list[int], int]:
    first_step, tell = os.pipe()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(first_step)
                os.dup2(os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                os.environ.update(variables | rank_variables(rank))
                run_training(cache, folder, tell)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    os.close(tell)
    return pids, first_step


def finish(cache: Path, folder: Path, world_size: int) -> None:
    with started(cache, folder, world_size) as (pids, _):
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(statuses), (folder.parent / "log.txt").read_text()


def kill(cache: Path, folder: Path, world_size: int, moment: float) -> bool:
    """Start a run and kill it `moment` seconds after its first step; whether it was still running."""
    with started(cache, folder, world_size) as (pids, first_step):
        select.select([first_step], [], [])  # a byte, or the end of all processes
        os.read(first_step, 1)
        select.select([], [], [], moment)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return any(os.WIFSIGNALED(status) for status in statuses)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def main() -> None:
    root, world_size, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    root.mkdir()
    cache = make_cache(root / "codes")
    finish(cache, root / "whole", world_size)
    expected = load_checkpoint(root / "whole" / LAST)
    rng = random.Random(0)
    runs, killed, in_a_write, wrong = 0, 0, 0, []
    folder, before = root / "run0", 0
    while killed < kills:
        died = kill(cache, folder, world_size, rng.uniform(0, LONGEST_LIFE))
        killed += died
        in_a_write += died and any(folder.glob(".checkpoint-new.pth.*.tmp"))
        newest = load_newest(folder) if folder.exists() else None
        step = 0 if newest is None else newest[1]["step"]
        assert step >= before, f"step {before} was saved, {step} is the newest now"
        before = step
        if not died or killed == kills:
            finish(cache, folder, world_size)
            model = load_checkpoint(folder / LAST)["model"]
            same = all(torch.equal(value, model[name]) for name, value in expected["model"].items())
            if not same or losses(folder) != losses(root / "whole"):
                wrong.append(str(folder))
            runs += 1
            folder, before = root / f"run{runs}", 0
    print(json.dumps({"killed": killed, "in_a_write": in_a_write, "runs": runs, "wrong": wrong}))


if __name__ == "__main__":
    main()
