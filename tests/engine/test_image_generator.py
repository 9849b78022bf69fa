"""The generator of Python users: its pictures are those of an evaluation, its mistakes are sentences."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.hub.export import export
from engine.image_generator import TRAIN_SETTINGS, ImageGenerator
from models import build_model
from tests.helpers.evaluation_case import CLASSES, SIZE, eval_config, networks
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import save_tokenizer
from util.checkpoint import load_checkpoint, save_checkpoint
from util.errors import UserError

NAMES = ["ash", "birch", "cedar", "date", "elm"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its tokenizer, and both as an exported folder."""
    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = networks()
    content = {"model": model.float().state_dict(), "config": dataclasses.asdict(model.config), "classes": NAMES}
    save_checkpoint(folder / "model.pth", content)
    save_tokenizer(tokenizer, folder / "tokenizer.pt")
    export(folder / "model.pth", folder / "exported", vqgan_path=folder / "tokenizer.pt")
    return folder


def test_pictures_are_those_of_an_evaluation(trained: Path, tmp_path: Path) -> None:
    """Same class, number and seed: same order, same draws, same pixels."""
    from engine.evaluation.evaluate import evaluate
    from engine.evaluation.inputs import open_inputs
    from util.dist import Dist

    generator = ImageGenerator(trained / "model.pth", trained / "tokenizer.pt", device="cpu")
    pictures = generator(range(CLASSES), steps=4, cfg=3.0, seed=3)
    config, _ = eval_config(
        tmp_path, num_images=CLASSES, group_sizes=None, generation_steps=4, cfg=3.0, decode_path="plain",
        feature_extractor=None, save_images=True,
    )  # fmt: skip
    dist = Dist(0, 1, generator.device)
    evaluate(generator.model, generator.tokenizer, config, open_inputs(config, generator.model.config, dist), dist)
    expected = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "images").glob("*.png"))]
    assert len(pictures) == len(expected) == CLASSES
    assert all(np.array_equal(np.asarray(one), other) for one, other in zip(pictures, expected, strict=True))


def test_an_exported_folder_has_all_it_takes_and_classes_have_names(trained: Path) -> None:
    generator = ImageGenerator(trained / "exported", device="cpu")
    named, numbered = generator(["cedar", "ash"], seed=1), generator([2, 0], seed=1)
    assert [picture.tobytes() for picture in named] == [picture.tobytes() for picture in numbered]
    assert named[0].tobytes() != named[1].tobytes()


def test_released_weights_record_no_sizes(tmp_path: Path, trained: Path) -> None:
    """They are found by width and depth; guards against a wrong number of heads, which shapes do not show."""
    model = build_model("lpd_debug", img_size=SIZE, stride=4, class_num=CLASSES, vocab_size=12)
    save_checkpoint(tmp_path / "released.pth", {"model": model.state_dict()})
    generator = ImageGenerator(tmp_path / "released.pth", trained / "tokenizer.pt", device="cpu")
    assert generator.model.config == model.config
    save_checkpoint(tmp_path / "odd.pth", {"model": networks()[0].state_dict()})
    with pytest.raises(UserError, match="not those of lpd_l"):
        ImageGenerator(tmp_path / "odd.pth", trained / "tokenizer.pt", device="cpu")


def test_the_tokenizer_is_the_one_that_the_training_names(trained: Path, tmp_path: Path) -> None:
    """The settings beside a checkpoint say which; without them it must be named."""
    shutil.copy(trained / "model.pth", tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer beside it: name its file \(--vqgan_path\)"):
        ImageGenerator(tmp_path / "model.pth", device="cpu")
    settings = tmp_path / TRAIN_SETTINGS
    settings.write_text(json.dumps({"settings": {"vqgan_path": str(trained / "tokenizer.pt")}}))
    found = ImageGenerator(tmp_path / "model.pth", device="cpu")
    assert found.files()["vqgan_path"]["path"] == str(trained / "tokenizer.pt")
    expected = ImageGenerator(trained / "exported", device="cpu")([1])[0]
    assert found([1])[0].tobytes() == expected.tobytes()
    settings.write_text("{")
    with pytest.raises(UserError, match="settings of the training"):
        ImageGenerator(tmp_path / "model.pth", device="cpu")


def test_a_tokenizer_that_does_not_fit_is_refused(trained: Path, tmp_path: Path) -> None:
    for stride, codes, said in ((8, 12, "has stride 8, but the model"), (4, 13, "has codes 13, but the model")):
        save_tokenizer(tiny_tokenizer(stride, codes), tmp_path / "other.pt")
        with pytest.raises(UserError, match=said):
            ImageGenerator(trained / "model.pth", tmp_path / "other.pt", device="cpu")
    content = load_checkpoint(trained / "model.pth") | {"tokenizer_sha256": "00" * 32}
    save_checkpoint(tmp_path / "model.pth", content)
    with pytest.raises(UserError, match="trained on codes of another tokenizer"):
        ImageGenerator(tmp_path / "model.pth", trained / "tokenizer.pt", device="cpu")


def test_batches_of_one_run_have_numbers(trained: Path) -> None:
    """And any decode path; orders and codes come with the pictures."""
    generator = ImageGenerator(trained / "exported", device="cpu")
    generator.model.double()
    generator.tokenizer.double()
    whole = generator.generate([0, 1, 2, 3], steps=4, seed=1)
    part = generator.generate([2, 3], steps=4, seed=1, numbers=[2, 3])
    assert torch.equal(part.codes, whole.codes[2:])
    assert (part.orders == whole.orders[2:]).all()
    assert (part.images == whole.images[2:]).all()
    assert (generator.decode_pixels(whole.codes) == whole.images).all()
    assert whole.known == 0
    assert sum(whole.group_sizes) == whole.codes.shape[1]
    single = ImageGenerator(trained / "exported", device="cpu")
    packed, plain = (single.generate([0, 1], steps=4, path=path).codes for path in ("packed", "plain"))
    assert torch.equal(packed, plain)


def test_mistakes_are_named(trained: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        ImageGenerator(trained / "nowhere")
    generator = ImageGenerator(trained / "exported", device="cpu")
    with pytest.raises(UserError, match="no class 'fir'; it has ash, birch"):
        generator(["fir"])
    with pytest.raises(UserError, match="class 7 is out of range"):
        generator([7])
    with pytest.raises(UserError, match=r"cfg is 0\.5"):
        generator([0], cfg=0.5)
