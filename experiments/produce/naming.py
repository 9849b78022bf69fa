"""Who names them? A picture of each class without its name, the same of test photos, and what they were called.

Test photos are shown as they are, and as the tokenizer makes them anew, to tell its loss from the model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.cells import Model, Scale, load_model, tokenizer_path
from experiments.produce.scales import NAMED_SAMPLING
from experiments.reports import read_figures
from util.data.images import open_images
from util.dist import Dist
from util.errors import UserError, reading
from util.files import sha256, write_json
from util.pictures import image_grid, save_png, to_float, to_uint8
from util.readers import read_json

GRIDS = {
    "pictures": "unlabelled.png",
    "photos": "unlabelled_photos.png",
    "reconstructions": "unlabelled_reconstructions.png",
}
ANSWERS = "unlabelled.json"
NAMED = "named.json"  # written by whoever shows the grids to somebody
COLUMNS = 7


def what_is_drawn(out: Path, scale: Scale, model: Model) -> dict[str, Any]:
    """All that the pictures depend on, as plain data. UserError without the model or its tokenizer."""
    files = {"checkpoint": model.checkpoint(out), "tokenizer": tokenizer_path(out)}
    hashes = {f"{name}_sha256": sha256(path) for name, path in files.items()}
    return {"model": model.name, "steps": scale.tuning_steps, "seed": scale.seeds[0], **NAMED_SAMPLING, **hashes}


def draw_unlabelled(out: Path, scale: Scale, model: Model, photos: str, dist: Dist) -> None:
    """One picture of each class, one of ``photos`` and its reconstruction, in mixed orders, and the answers.

    Names that were given to earlier pictures are put aside, as ``named_before.json``.
    """
    (out / ANSWERS).unlink(missing_ok=True)
    if (out / NAMED).exists():
        (out / NAMED).replace(out / "named_before.json")
    drawn = what_is_drawn(out, scale, model)
    generator = load_model(out, scale, model, dist.device)
    names = generator.classes or [str(label) for label in range(generator.model.config.class_num)]
    pictures = generator(list(range(len(names))), drawn["steps"], seed=drawn["seed"], **NAMED_SAMPLING)
    images = open_images(photos, scale.img_size)
    rng = np.random.default_rng(drawn["seed"])
    chosen = {label: rng.choice(np.flatnonzero(images.labels == label)) for label in np.unique(images.labels).tolist()}
    originals = torch.stack([images.load(int(index)) for index in chosen.values()])
    with torch.inference_mode():
        codes = generator.tokenizer.encode(to_float(originals).to(dist.device))
        reconstructions = to_uint8(generator.tokenizer.decode(codes)).cpu()
    shown = {
        "pictures": {label: np.asarray(picture) for label, picture in enumerate(pictures)},
        "photos": dict(zip(chosen, originals.numpy(), strict=True)),
        "reconstructions": dict(zip(chosen, reconstructions.numpy(), strict=True)),
    }
    # Each model's in an order of its own: whoever has seen the answers to another's does not know these.
    rng = np.random.default_rng([drawn["seed"], int(drawn["checkpoint_sha256"][:8], 16)])
    answers = {}
    for kind, of_class in shown.items():
        mixed = rng.permutation(list(of_class)).tolist()
        numbers = [str(number) for number in range(1, len(mixed) + 1)]
        grid = image_grid(np.stack([of_class[label] for label in mixed]), COLUMNS, numbers)
        save_png(grid, out / GRIDS[kind])
        answers[kind] = {number: names[label] for number, label in zip(numbers, mixed, strict=True)}
    write_json(out / ANSWERS, drawn | answers)


def read_unlabelled(out: Path, scale: Scale, model: Model) -> dict[str, Any] | None:
    """The answers for the present pictures, and under ``named`` what they were called, asking by asking.

    ``named.json`` is a list; an asking has ``who``, and under some of the names in GRIDS the name of each number.
    Without pictures that are drawn as they would be now the result is None.

    Raises:
        UserError: if a file is damaged, or a number has no name or one that is no class's.
    """
    path = out / ANSWERS
    if not all((out / name).exists() for name in (ANSWERS, *GRIDS.values())):
        return None
    answers = read_figures("answers", path, *GRIDS)
    with reading("answers", path):
        _check_names(answers, *GRIDS)
    if not answers.items() >= what_is_drawn(out, scale, model).items():
        return None
    return answers | {"named": _read_named(out / NAMED, answers) if (out / NAMED).exists() else []}


def count_right(answers: dict[str, Any], asking: dict[str, Any], kind: str) -> int | None:
    """How many of a kind an asking named as they are; None where it was not shown them."""
    return len(answers[kind].items() & asking[kind].items()) if kind in asking else None


def _read_named(path: Path, answers: dict[str, Any]) -> list[dict[str, Any]]:
    what = "names given to pictures"
    with reading(what, path):
        askings: list[dict[str, Any]] = read_json(what, path)
        if not isinstance(askings, list):
            raise ValueError("it is no list")
        for asking in askings:
            if not isinstance(asking["who"], str) or not asking.keys() & GRIDS.keys():
                raise ValueError("somebody named nothing")
            _check_names(asking, *(asking.keys() & GRIDS.keys()))
    for asking in askings:
        for kind in asking.keys() & GRIDS.keys():
            if asking[kind].keys() != answers[kind].keys():
                raise UserError(f"{path} must give each of the {len(answers[kind])} {kind} a name, by its number.")
            unknown = {*asking[kind].values()} - {*answers[kind].values()}
            if unknown:
                raise UserError(f"{path} names one of the {kind} {min(unknown)!r}, which is no class of them.")
    return askings


def _check_names(found: dict[str, Any], *kinds: str) -> None:
    for kind in kinds:
        if not all(isinstance(name, str) for name in found[kind].values()):
            raise ValueError(f"a name of the {kind} is no text")
