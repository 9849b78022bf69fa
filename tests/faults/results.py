"""What a command under attack is, and what of its results is compared between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import orders
from orders.files import load_schedule
from util.checkpoint import load_checkpoint


@dataclass(frozen=True)
class Command:
    """A command: `arguments` of the folder of inputs, with the output in OUT; `result` is compared between runs."""

    name: str
    main: Callable[[], None]
    arguments: str
    result: Callable[[Path, str], Any]
    until: str | None = None  # pattern of what an unfinished run has in its output: such a run is resumed
    measures: bool = False  # results are times; only what comes before the work is attacked
    in_place: bool = False  # its output lies among the inputs, which `result` is then given
    sound: Callable[[str], bool] = lambda said: True  # whether what it printed is right, whatever its flags

    def words(self, out: Path) -> list[str]:
        return [word.replace("OUT", str(out)) for word in self.arguments.split()]


def digest(parts: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def weights(path: Path) -> str:
    state = load_checkpoint(path)["model"]
    return digest(part for name in sorted(state) for part in (name.encode(), state[name].numpy().tobytes()))


def file_digest(path: Path) -> str:
    return digest([path.read_bytes()])


def codes(out: Path, said: str) -> Any:
    arrays = [np.load(out / f"{name}.npy").tobytes() for name in ("codes", "codes_flip", "labels")]
    return digest(arrays), json.loads((out / "header.json").read_text())["classes"]


def scores(out: Path, said: str) -> Any:
    results = json.loads((out / "results.json").read_text())
    pictures = sorted((out / "images").glob("*.png"))
    names = ("num_images", "frechet_distance", "class_accuracy")
    figures = [round(results[name], 6) for name in names]
    return figures, len(pictures), digest(Image.open(path).tobytes() for path in pictures)


def printed_scores(out: Path, said: str) -> Any:
    printed = json.loads(said.splitlines()[-1])
    return round(printed["frechet_distance"], 6), printed["num_images"]


def statistics(out: Path, said: str) -> Any:
    with np.load(out / "statistics.npz") as file:
        return digest(file[name].tobytes() for name in ("mu", "sigma"))


def exported(out: Path, said: str) -> Any:
    described = json.loads((out / "config.json").read_text())
    left = sorted(path.name for path in out.iterdir())
    return weights(out / "model.safetensors"), described["config"], described["classes"], left


def pictures(out: Path, said: str) -> Any:
    names = sorted(path.name for path in out.iterdir())
    return names, digest(Image.open(path).tobytes() for path in sorted(out.glob("*.png")))


def likelihood(out: Path, said: str) -> Any:
    cells = json.loads((out / "likelihood.json").read_text())["cells"]
    return [(cell["name"], round(cell["bits_per_token"]["mean"], 6)) for cell in cells]


def schedule(out: Path, said: str) -> Any:
    return len(load_schedule(out / "schedule.json", 4, 0).group_sizes)  # the rest depends on the time


def compared(out: Path, said: str) -> Any:
    return [scores(out / f"lpd_{steps}", said) for steps in (4, 2)], file_digest(out / "strip.png")


def drawn(name: str) -> Callable[[Path, str], Any]:
    return lambda out, said: digest([Image.open(out / name).tobytes()])


def generated_orders(name: str) -> Callable[[Path, str], Any]:
    return lambda out, said: digest([orders.load_orders(out / name, 4).tobytes()])


def nothing(out: Path, said: str) -> Any:
    return None
