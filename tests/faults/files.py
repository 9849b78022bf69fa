"""Damaged files: every kind of file that a command reads, damaged in every way."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.commands import COMMANDS, Command, stop_in_the_middle
from tests.faults.damage import damages_of, odd_array, odd_json, odd_tensor, odd_torch
from tests.faults.worker import LIMIT_S, Kind, Outcome, call, judge

GROUP = "damaged files"


@dataclass(frozen=True)
class Target:
    """A file that a command reads: a pattern below the folder of inputs, or below OUT what an unfinished run left.

    Args:
        free: the file has no check sum: what is valid is taken as it is. Files whose odd values are written with right
            check sums are taken as they are in any case.
    """

    command: str
    pattern: str
    free: bool = False


TARGETS = (
    Target("cache", "pictures/ant/*.png"),
    Target("train on pictures", "pictures/bee/*.png"),
    Target("metrics", "pictures/ant/photo.jpg", free=True),
    Target("cache an archive", "pictures.npz"),
    Target("cache a list", "list.csv", free=True),
    Target("cache a list", "names.json", free=True),
    Target("cache", "tokenizer.pt"),
    Target("cache an archive", "tokenizer.safetensors", free=True),
    Target("convert a cache", "published/bee/*.npz"),
    Target("train", "codes/header.json"),
    Target("train", "codes/codes.npy"),
    Target("train", "codes/codes_flip.npy"),
    Target("train", "codes/labels.npy"),
    Target("train from a checkpoint", "run/checkpoint-last.pth"),
    Target("train from a checkpoint", "schedules.json", free=True),
    Target("evaluate", "run/checkpoint-last.pth"),
    Target("evaluate an export", "exported/model.safetensors"),
    Target("evaluate an export", "exported/config.json"),
    Target("evaluate an export", "orders.safetensors", free=True),
    Target("evaluate with files", "orders.json", free=True),
    Target("evaluate with files", "orders.json.settings", free=True),
    Target("evaluate with files", "sizes.json", free=True),
    Target("evaluate a schedule", "found/schedule.json", free=True),
    Target("evaluate", "classifier.pt"),
    Target("metrics", "classifier.pt"),
    Target("metrics", "reference.npz"),
    Target("hub export", "run/checkpoint-last.pth"),
    Target("orders convert", "orders.json", free=True),
    Target("orders stats", "orders.safetensors", free=True),
    Target("results table", "evaluated/results.json", free=True),
    Target("results table", "evaluated/results.jsonl", free=True),
    Target("compare", "tokenizer.pt"),
    Target("likelihood", "codes/codes.npy"),
    Target("likelihood", "run/checkpoint-last.pth"),
    Target("generate", "run/checkpoint-last.pth"),
    Target("edit", "pictures/ant/photo.jpg", free=True),
    Target("edit codes", "picture.npy", free=True),
    Target("edit codes", "mask.png"),
    Target("plots loss", "run/metrics.jsonl", free=True),
    Target("plots loss", "run/train_settings.json", free=True),
    Target("plots quality", "evaluated/results.json", free=True),
    Target("produce.data", "shop/*/*/*/*/*.jpg", free=True),
    *(
        Target("produce.run report", f"produced/{pattern}", free=True)
        for pattern in (
            *("eval/*/results.json", "tokenizer/metrics.json", "lpd_random/metrics.jsonl", "contexts.json"),
            *("neighbours/*.json", "likelihood/*/likelihood.json", "unlabelled.json", "named.json"),
        )
    ),
    Target("produce.report", "report_produce/produce.json", free=True),
    Target("cifar10.report", "report_cifar10/cifar10.json", free=True),
    Target("publish_likelihood", "likelihood/likelihood.json", free=True),
    Target("publish_likelihood", "likelihood/steps.png", free=True),
    Target("publish_likelihood", "found/schedule.json", free=True),
    Target("publish_likelihood", "evaluated/results.json", free=True),
    Target("gpu_suite publish", "suite/summary.json", free=True),
    Target("gpu_suite publish", "suite/latency_by_path.json", free=True),
    Target("hub push", "exported/tokenizer.pt", free=True),
    Target("produce.run", "OUT/stages.json", free=True),
    Target("likelihood", "OUT/partial-*/part_*.npz"),
    Target("train", "OUT/checkpoint-last.pth"),
    Target("train", "OUT/checkpoint-last.json"),
    Target("train", "OUT/metrics.jsonl"),
    Target("evaluate", "OUT/partial-*/part_*.npz"),
    Target("evaluate", "OUT/partial-*/png/*.png"),
    Target("cache", "OUT/.parts/*.npz"),
    Target("cache", "OUT/.parts/job.json"),
    Target("classifier", "OUT/classifier.pt.state.pth"),
    Target("tokenizers.train", "OUT/state.pth"),
    Target("tokenizers.train", "OUT/metrics.json"),
    Target("tokenizers.train", "OUT/metrics.jsonl"),
    Target("tokenizers.train", "OUT/tokenizer.pt"),
)
_REWRITTEN = (odd_array, odd_json, odd_tensor, odd_torch)


class DamagedFiles:
    """The cases, on copies of `inputs`."""

    def __init__(self, inputs: Path, scratch: Path) -> None:
        self.inputs, self.scratch = inputs, scratch
        self._right: dict[str, Any] = {}
        self._unfinished: dict[str, Path] = {}

    def right(self, command: Command) -> Any:
        """The results of the undisturbed command."""
        if command.name not in self._right:
            out = inputs = self.scratch / "undisturbed" / command.name
            if command.in_place:
                shutil.copytree(self.inputs, inputs, symlinks=True)
            else:
                inputs = self.inputs
            ended = call(command.main, command.words(out), inputs)
            if ended.status != 0:
                raise RuntimeError(f"{command.name}, undisturbed: status {ended.status}\n{ended.err}")
            self._right[command.name] = command.result(out, ended.out)
        return self._right[command.name]

    def unfinished(self, command: Command) -> Path:
        """The output of a run that was killed in the middle."""
        if command.name not in self._unfinished:
            out = self.scratch / "unfinished" / command.name
            left = [target.pattern for target in TARGETS if target.command == command.name]
            stop_in_the_middle(command, self.inputs, out, [p[4:] for p in left if p.startswith("OUT/")])
            self._unfinished[command.name] = out
        return self._unfinished[command.name]

    def cases(self, rounds: int) -> Iterator[tuple[Target, int, int]]:
        """(target, number of the damage, round)."""
        for target in TARGETS:
            for number in range(len(damages_of(Path(target.pattern)))):
                for turn in range(rounds):
                    yield target, number, turn

    def run(self, target: Target, number: int, turn: int) -> Outcome:
        command = COMMANDS[target.command]
        right = self.right(command)
        case, damage = self.scratch / "case", damages_of(Path(target.pattern))[number]
        inputs = case / "inputs"
        out = inputs if command.in_place else case / "out"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.inputs, inputs, symlinks=True)
        where, pattern = inputs, target.pattern
        if target.pattern.startswith("OUT/"):
            shutil.copytree(self.unfinished(command), out, symlinks=True)
            where, pattern = out, target.pattern.removeprefix("OUT/")
        rng = random.Random(f"{target} {damage.__name__} {number} {turn}")
        found = sorted(where.glob(pattern))
        if not found:
            raise RuntimeError(f"there is no {pattern} to be damaged in {where}")
        path = rng.choice(found)
        damage(path, rng)
        ended = call(command.main, command.words(out), inputs, LIMIT_S)
        free = target.free or damage in _REWRITTEN

        def same() -> bool:
            return command.result(out, ended.out) == right

        try:
            kind, said = judge(ended, same, free)
        except Exception as error:  # results that can't be read
            kind, said = Kind.WRONG, f"{type(error).__name__}: {error}"
        name = f"{target.command}: {target.pattern}, {damage.__name__} ({number}.{turn})"
        return Outcome(GROUP, name, kind, said)
