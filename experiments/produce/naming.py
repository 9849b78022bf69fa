"""Who names them? A picture of each class without its name, the same of test photos, and what somebody called them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import Model, Scale, file_hashes, load_model
from experiments.produce.scales import NAMED_SAMPLING
from experiments.reports import read_figures
from util.data.images import open_images
from util.dist import Dist
from util.errors import UserError, reading
from util.files import write_json
from util.pictures import image_grid, save_png

GRIDS = {"pictures": "unlabelled.png", "photos": "unlabelled_photos.png"}
ANSWERS = "unlabelled.json"
NAMED = "named.json"  # written by whoever shows the grids to somebody
COLUMNS = 7


def draw_unlabelled(out: Path, scale: Scale, model: Model, photos: str, dist: Dist) -> None:
    """One picture and one of ``photos`` of each class, by the first seed and in mixed order, and the answers."""
    (out / NAMED).unlink(missing_ok=True)  # names of other pictures
    generator, seed, images = (
        load_model(out, scale, model, dist.device),
        scale.seeds[0],
        open_images(photos, scale.img_size),
    )
    names = generator.classes or [str(label) for label in range(generator.model.config.class_num)]
    drawn = generator(list(range(len(names))), scale.tuning_steps, seed=seed, **NAMED_SAMPLING)
    rng = np.random.default_rng(seed)
    chosen = {label: rng.choice(np.flatnonzero(images.labels == label)) for label in np.unique(images.labels).tolist()}
    shown = {
        "pictures": {label: np.asarray(picture) for label, picture in enumerate(drawn)},
        "photos": {label: images.load(int(index)).numpy() for label, index in chosen.items()},
    }
    about = _hashes(out, model)
    # Each model's in an order of its own: whoever has seen the answers to another's does not know these.
    rng = np.random.default_rng([seed, int(about["checkpoint_sha256"][:8], 16)])
    answers = {}
    for kind, of_class in shown.items():
        mixed = rng.permutation(list(of_class)).tolist()
        numbers = [str(number) for number in range(1, len(mixed) + 1)]
        grid = image_grid(np.stack([of_class[label] for label in mixed]), COLUMNS, numbers)
        save_png(grid, out / GRIDS[kind])
        answers[kind] = {number: names[label] for number, label in zip(numbers, mixed, strict=True)}
    settings = {"model": model.name, "steps": scale.tuning_steps, "seed": seed, **NAMED_SAMPLING}
    write_json(out / ANSWERS, settings | about | answers)


def read_unlabelled(out: Path, model: Model) -> dict[str, Any] | None:
    """The answers for pictures of the present model, and under ``named`` what somebody called them, None before.

    ``named.json`` has ``who`` and, under ``pictures`` and ``photos``, the name of each number. Without pictures of the
    present model the result is None.

    Raises:
        UserError: if a file is damaged, or a number has no name or one that is no class's.
    """
    path = out / ANSWERS
    if not all((out / name).exists() for name in (ANSWERS, *GRIDS.values())):
        return None
    answers = _read_names("answers", path)
    if not answers.items() >= _hashes(out, model).items():
        return None
    path = out / NAMED
    return answers | {"named": _read_named(path, answers) if path.exists() else None}


def count_right(unlabelled: dict[str, Any], kind: str) -> int:
    """How many of a kind somebody named as they are."""
    return len(unlabelled[kind].items() & unlabelled["named"][kind].items())


def _hashes(out: Path, model: Model) -> dict[str, str]:
    """Of what the pictures depend on."""
    return {name: value for name, value in file_hashes(out, model).items() if not name.startswith("classifier")}


def _read_named(path: Path, answers: dict[str, Any]) -> dict[str, Any]:
    named = _read_names("names given to pictures", path, "who")
    for kind in GRIDS:
        if named[kind].keys() != answers[kind].keys():
            raise UserError(f"{path} must give each of the {len(answers[kind])} {kind} a name, by its number.")
        unknown = {*named[kind].values()} - {*answers[kind].values()}
        if unknown:
            raise UserError(f"{path} names one of the {kind} {min(unknown)!r}, which is no class of them.")
    return named


def _read_names(what: str, path: Path, *more: str) -> dict[str, Any]:
    """A file with names by number, and other strings. UserError where they are none."""
    found = read_figures(what, path, *GRIDS, *more)
    with reading(what, path):
        texts = [found[name] for name in more]
        for kind in GRIDS:
            texts += found[kind].values()
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError("a name is no text")
    return found
