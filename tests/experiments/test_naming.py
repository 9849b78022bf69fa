"""Pictures without names: each number shows the class of its answer, and what somebody called them is counted right."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from experiments import cells
from experiments.produce import naming, page
from experiments.produce.scales import NAMED_SAMPLING, TINY
from tests.helpers.experiment_results import produce_results
from util.data.images import write_image_archive
from util.dist import Dist
from util.errors import UserError
from util.files import write_json

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (250, 250, 250)}
CLASSES = list(COLOURS)
MODEL = TINY.models[0]


def plain(colour: tuple[int, int, int], width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output folder of a run whose files are there; of the class "blue" there is no test photo."""
    files = []
    for name in ("green", "red", "white", "red"):
        file = io.BytesIO()
        plain(COLOURS[name], 90, 70).save(file, "PNG")
        files.append(file.getvalue())
    write_image_archive(tmp_path / "photos.npz", files, [1, 0, 3, 0], CLASSES, [1] * 4)
    folder = tmp_path / "out"
    for path in (MODEL.checkpoint(folder), cells.tokenizer_path(folder), cells.classifier_path(folder)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())
    return folder


@pytest.fixture
def draw(out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws with a model whose pictures have the colour that the class is called."""

    class Generator:
        classes = CLASSES
        model = SimpleNamespace(config=SimpleNamespace(class_num=4))
        tokenizer = SimpleNamespace(encode=lambda images: 2 * images, decode=lambda codes: codes / 2)

        def __call__(self, labels: list[int], steps: int, seed: int, **sampling: float) -> list[Any]:
            assert (steps, seed, sampling) == (TINY.tuning_steps, TINY.seeds[0], NAMED_SAMPLING)
            return [plain(COLOURS[CLASSES[label]], 64, 64) for label in labels]

    monkeypatch.setattr(naming, "load_model", lambda *_: Generator())

    def call() -> dict[str, Any]:
        photos = f"{out.parent / 'photos.npz'}:test"
        naming.draw_unlabelled(out, TINY, MODEL, photos, Dist(0, 1, torch.device("cpu")))
        return json.loads((out / naming.ANSWERS).read_text())

    return call


def colour_of(grid: Path, number: int) -> tuple[int, int, int]:
    """In the middle of a picture, counted from 1; none of these grids has a second row."""
    step = 64 + 8
    return Image.open(grid).getpixel((4 + (number - 1) * step + 32, 36))  # type: ignore[return-value]


def test_each_number_shows_the_class_of_its_answer(out: Path, draw: Any) -> None:
    """Guards against an order that is applied the other way round, and a class without test photos."""
    for content in (b"a", b"b", b"c"):  # each model's pictures stand in an order of its own
        MODEL.checkpoint(out).write_bytes(content)
        answers = draw()
        assert sorted(answers["pictures"].values()) == sorted(CLASSES)
        for kind in ("photos", "reconstructions"):
            assert sorted(answers[kind].values()) == ["green", "red", "white"]
        for kind, grid in naming.GRIDS.items():
            assert answers[kind] == {
                number: next(name for name in CLASSES if COLOURS[name] == colour_of(out / grid, int(number)))
                for number in answers[kind]
            }


def test_the_order_is_the_models_own(out: Path, draw: Any) -> None:
    """Guards against somebody who knows the answers from the pictures of an earlier model."""
    orders = set()
    for content in (b"a", b"b", b"c", b"d"):
        MODEL.checkpoint(out).write_bytes(content)
        orders.add(tuple(draw()["pictures"].values()))
    assert len(orders) > 1


def test_names_belong_to_the_pictures_they_were_given_to(out: Path, draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the names of pictures that are no more there."""
    assert naming.read_unlabelled(out, TINY, MODEL) is None
    answers = draw()
    assert naming.read_unlabelled(out, TINY, MODEL) == answers | {"named": []}
    assert (answers["steps"], answers["seed"], answers["cfg"]) == (TINY.tuning_steps, TINY.seeds[0], 6.0)
    asking = {"who": "A child", "pictures": answers["pictures"]}
    write_json(out / naming.NAMED, [asking])
    found = naming.read_unlabelled(out, TINY, MODEL)
    assert found is not None
    assert (naming.count_right(found, asking, "pictures"), naming.count_right(found, asking, "photos")) == (4, None)
    cells.classifier_path(out).write_bytes(b"another judge")  # which had no part in them
    assert naming.read_unlabelled(out, TINY, MODEL) == found
    with monkeypatch.context() as patch:
        patch.setitem(naming.NAMED_SAMPLING, "cfg", 2.0)
        assert naming.read_unlabelled(out, TINY, MODEL) is None
    MODEL.checkpoint(out).write_bytes(b"trained again")
    assert naming.read_unlabelled(out, TINY, MODEL) is None
    draw()
    assert not (out / naming.NAMED).exists()
    assert json.loads((out / "named_before.json").read_text()) == [asking]


def test_other_names_are_one_sentence(out: Path, draw: Any) -> None:
    answers = draw()
    good = {"who": "A child"} | {kind: answers[kind] for kind in naming.GRIDS}
    first, *others = answers["pictures"]
    for asking, named in (
        (good | {"who": None}, "is truncated or damaged"),
        ({"who": "A child"}, "is truncated or damaged"),
        ({"pictures": good["pictures"]}, "is truncated or damaged"),
        (good | {"pictures": ["red"]}, "is truncated or damaged"),
        (good | {"pictures": {**good["pictures"], first: ["red"]}}, "is truncated or damaged"),
        (good | {"pictures": {**good["pictures"], first: "Red"}}, "names one of the pictures 'Red', which is no class"),
        (good | {"pictures": dict.fromkeys(others, "red")}, "each of the 4 pictures a name, by its number"),
        (good | {"photos": {}}, "each of the 3 photos a name, by its number"),
    ):
        write_json(out / naming.NAMED, [good, asking])
        with pytest.raises(UserError, match=rf"named\.json.*{named}"):
            naming.read_unlabelled(out, TINY, MODEL)
    for damaged in ({"who": "A child"}, [*naming.GRIDS], " ".join(naming.GRIDS), [["who", *naming.GRIDS]]):
        for name in (naming.NAMED, naming.ANSWERS):
            whole = (out / name).read_text()
            write_json(out / name, damaged)
            with pytest.raises(UserError, match=f"{name} is truncated or damaged"):
                naming.read_unlabelled(out, TINY, MODEL)
            (out / name).write_text(whole)


def test_without_a_model_there_are_no_pictures(out: Path, draw: Any) -> None:
    MODEL.checkpoint(out).unlink()
    with pytest.raises(UserError, match=r"checkpoint-last\.pth does not exist"):
        draw()


def test_the_page_says_how_many_were_named() -> None:
    found = produce_results()
    text = page.page(found)
    assert "| A child | 1 of 2 | – | – |" in text
    assert "| Its mother | 2 of 2 | 2 of 2 | 0 of 2 |" in text
    assert "1 Tomato, 2 Kiwi (named Tomato)<" in text
    text = page.page(found | {"unlabelled": found["unlabelled"] | {"named": []}})
    assert "Named right" not in text
    assert "1 Tomato, 2 Kiwi<" in text
