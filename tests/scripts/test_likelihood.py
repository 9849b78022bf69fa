"""scripts.likelihood and scripts.find_schedule as a user calls them, on a tiny model and data; and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main_cache
import main_lpd
import scripts.find_schedule
import scripts.likelihood
from models.lpd import LPD, LPDConfig
from orders import generate_orders, save_orders
from orders.files import load_schedule
from scripts.publish_likelihood import publish, put
from tests.helpers.commands import run
from tests.helpers.pictures import assert_not_blank, assert_text, pixels_of
from tests.helpers.tiny_models import far_from_initialisation, tiny_tokenizer, write_images
from tokenizers import save_tokenizer
from util.checkpoint import save_checkpoint
from util.errors import UserError
from util.files import sha256

CLASSES = {"cat": 5, "dog": 6, "eel": 1}
COUNT = 12
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, images, their codes, and a model of these classes."""
    folder = tmp_path_factory.mktemp("likelihood")
    write_images(folder / "images", CLASSES, 16, 16)
    torch.manual_seed(0)
    save_tokenizer(tiny_tokenizer(), folder / "tokenizer.pt")
    save_model(folder / "model.pth", folder / "tokenizer.pt")
    files = ("--vqgan_path", folder / "tokenizer.pt", "--data_path", folder / "images")
    assert not run(main_cache.main, *files, "--cached_path", folder / "codes", "--img_size", 16, "--num_workers", 0)
    return folder


def save_model(path: Path, tokenizer: Path, classes: tuple[str, ...] = tuple(CLASSES), **size: int) -> Path:
    values: dict[str, Any] = {
        "img_size": 16,
        "stride": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "vocab_size": 12,
    } | size
    config = LPDConfig(class_num=len(classes), **values)
    model = far_from_initialisation(LPD(config), 0.3)
    about = {"config": asdict(config), "classes": list(classes), "tokenizer_sha256": sha256(tokenizer)}
    save_checkpoint(path, {"model": model.state_dict(), **about})
    return path


@pytest.fixture
def likelihood(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    return commanding(scripts.likelihood.main, folder, tmp_path / "out", capfd)


@pytest.fixture
def find_schedule(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    return commanding(scripts.find_schedule.main, folder, tmp_path / "found", capfd)


def commanding(main: Callable[[], None], folder: Path, output_dir: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Calls the command with a model and an output folder, and codes unless other data are named."""

    def call(*arguments: object) -> tuple[int, str, str]:
        words = ["--device", "cpu", "--pretrained_ckpt", folder / "model.pth", "--output_dir", output_dir]
        if not {"--data_path", "--cached_path"} & set(arguments):
            words += ["--cached_path", folder / "codes"]
        capfd.readouterr()
        return run(main, *words, *arguments), *capfd.readouterr()

    return call


@pytest.mark.slow
def test_from_codes_to_table_json_and_plots(likelihood: Command, tmp_path: Path) -> None:
    status, printed, errors = likelihood("--orders", "lpd", "raster", "lpd:none:2", "--steps", 16, 4, "1,15")
    assert status == 0, errors
    results = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    assert [row["name"] for row in results["cells"]] == [
        *("lpd/16", "lpd/4", "lpd/2", "raster/16", "raster/4", "raster/2", "lpd:none:2/16", "lpd:none:2/4"),
        "lpd:none:2/2",
    ]
    assert results["num_images"] == COUNT
    assert (tmp_path / "out" / "table.md").read_text() in printed
    last = json.loads(printed.splitlines()[-1])
    best = min(results["cells"], key=lambda row: row["bits_per_token"]["mean"])
    assert last["least_bits_per_token"] == {"name": best["name"], **best["bits_per_token"]}
    assert (last["cells"], last["num_images"], last["results"]) == (9, COUNT, str(tmp_path / "out/likelihood.json"))
    assert last["seconds"] > 0
    for name in ("steps", "curves", "positions"):
        assert_not_blank(tmp_path / "out" / f"{name}.png")
        assert_text(pixels_of(tmp_path / "out" / f"{name}.png"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("curves.png", "likelihood.json", "positions.png", "steps.png", "table.md"),
    ]


@pytest.mark.slow
def test_images_are_as_likely_as_their_codes(likelihood: Command, folder: Path, tmp_path: Path) -> None:
    """Encoded here or by main_cache.py; of twelve images every third, so that all classes are among them."""
    images = ("--data_path", folder / "images", "--vqgan_path", folder / "tokenizer.pt")
    common = ("--orders", "random", "--steps", 4, "--num_images", 4, "--conditions", "class", "none")
    found = []
    for source in (images, ("--cached_path", folder / "codes")):
        status, _, errors = likelihood(*common, *source)
        assert status == 0, errors
        found.append(json.loads((tmp_path / "out" / "likelihood.json").read_text())["cells"])
    assert [row["with_class"] for row in found[0]] == [True, False]
    assert found[0][0]["bits_per_token"] != found[0][1]["bits_per_token"]
    for mine, theirs in zip(*found, strict=True):
        assert mine["bits_per_token"] == pytest.approx(theirs["bits_per_token"], rel=1e-5)
        assert mine["position_bits"] == pytest.approx(theirs["position_bits"], rel=1e-4)


def test_classes_are_those_of_the_names(likelihood: Command, folder: Path, tmp_path: Path) -> None:
    """A model with the classes in another order, and more of them, whose table is permuted alike, says the same."""
    assert likelihood("--orders", "raster", "--steps", 4)[0] == 0
    expected = json.loads((tmp_path / "out" / "likelihood.json").read_text())["cells"][0]["bits_per_token"]
    content = torch.load(folder / "model.pth")
    content["classes"] = ["ant", "eel", "dog", "cat"]
    content["config"]["class_num"] = 4
    table = content["model"]["class_emb.weight"]
    content["model"]["class_emb.weight"] = table[[0, 2, 1, 0]]
    save_checkpoint(tmp_path / "other.pth", content)
    assert likelihood("--orders", "raster", "--steps", 4, "--pretrained_ckpt", tmp_path / "other.pth")[0] == 0
    found = json.loads((tmp_path / "out" / "likelihood.json").read_text())["cells"][0]["bits_per_token"]
    assert found == pytest.approx(expected)


@pytest.mark.slow
def test_a_found_schedule_is_evaluated_as_it_is(
    find_schedule: Command, likelihood: Command, folder: Path, tmp_path: Path
) -> None:
    """Searched and confirmed on halves of the images; taken by scripts.likelihood and main_lpd.py."""
    status, printed, errors = find_schedule("--generation_steps", 4, "--budget_sec", 8, "--orders_per_image", 3)
    assert status == 0, errors
    schedule, last = tmp_path / "found" / "schedule.json", json.loads(printed.splitlines()[-1])
    assert last["flags"] == f"--schedule_file {schedule}"
    assert last["seconds"] < 20
    assert last["confirmed_on"] == COUNT // 2
    found, spec = json.loads(schedule.read_text())["found"], load_schedule(schedule, 4, 0)
    assert list(spec.group_sizes) == last["group_sizes"]
    assert found["difference"] == last["difference"]
    difference = found["bits_per_token"]["mean"] - found["published_bits_per_token"]["mean"]
    assert difference == pytest.approx(found["difference"]["mean"])
    assert last["better"] == (found["difference"]["high"] < 0)
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["schedule.json"]

    status, _, errors = likelihood("--orders", "lpd", "--steps", 4, "--schedule_files", schedule)
    assert status == 0, errors
    rows = json.loads((tmp_path / "out" / "likelihood.json").read_text())["cells"]
    assert [row["order"] for row in rows] == ["lpd", "schedule.json"]
    assert rows[1]["group_sizes"] == last["group_sizes"]
    assert rows[1]["baseline"] == "lpd/4"

    flags = ("--device", "cpu", "--num_images", 3, "--feature_extractor", "none", "--output_dir", tmp_path / "eval")
    files = ("--pretrained_ckpt", folder / "model.pth", "--vqgan_path", folder / "tokenizer.pt")
    with pytest.raises(SystemExit) as stop:
        run_evaluation(*files, *flags, *last["flags"].split())
    assert stop.value.code == 0
    settings = json.loads((tmp_path / "eval" / "results.json").read_text())["settings"]
    for name in ("group_sizes", "proximity_threshold", "repulsion_threshold"):
        assert settings[name] == last[name]


def run_evaluation(*arguments: object) -> None:
    raise SystemExit(run(main_lpd.main, "--evaluate", *arguments))


def wrong(likelihood: Command, tmp_path: Path, *arguments: object) -> str:
    """The one sentence of a command that is refused before anything is written."""
    status, printed, errors = likelihood(*arguments)
    assert (status, printed) == (2, ""), errors
    assert not list((tmp_path / "out").glob("*"))
    [sentence] = [line for line in errors.splitlines() if line.startswith("error: ")]
    return sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num_images", 13), "--num_images is 13, but {folder}/codes holds 12 images"),
        (("--num_images", 1), "--num_images is 1; it must be at least 2"),
        (("--steps", 17), "number of steps 17 must lie between 1 and the 16 tokens"),
        (("--orders", "spiral"), "--orders 'spiral' must be a file, or one of lpd"),
        (("--baseline", "halton"), "--baseline 'halton' is none of"),
        (("--conditions", "all"), "--conditions is 'all'; choose one of class, none"),
        (("--data_path", "{folder}/images", "--cached_path", "{folder}/codes"), "give either --cached_path"),
        (("--data_path", "{folder}/images"), "--vqgan_path is missing"),
        (("--pretrained_ckpt", "{folder}/none.pth"), "none.pth does not exist"),
        (("--cached_path", "{folder}/none"), "{folder}/none is not a folder"),
        (("--schedule_files", "{folder}/none.json"), "none.json does not exist"),
        (("--orders_per_image", 0), "--orders_per_image is 0"),
    ],
)
def test_mistakes(
    arguments: tuple[object, ...], message: str, likelihood: Command, folder: Path, tmp_path: Path
) -> None:
    words = (str(word).format(folder=folder) for word in arguments)
    assert message.format(folder=folder) in wrong(likelihood, tmp_path, *words)


def test_what_does_not_belong_together(likelihood: Command, folder: Path, tmp_path: Path) -> None:
    """Codes of another tokenizer or grid, classes that the model lacks, too short a file of orders."""
    torch.manual_seed(1)
    save_tokenizer(tiny_tokenizer(), tmp_path / "other.pt")
    other = save_model(tmp_path / "a.pth", tmp_path / "other.pt")
    assert "was made with another tokenizer" in wrong(likelihood, tmp_path, "--pretrained_ckpt", other)
    larger = save_model(tmp_path / "b.pth", folder / "tokenizer.pt", img_size=32)
    sentence = wrong(likelihood, tmp_path, "--pretrained_ckpt", larger)
    assert "codes of" in sentence
    assert "are of 16 pixels, the model's of 32" in sentence
    few = save_model(tmp_path / "c.pth", folder / "tokenizer.pt", ("cat", "dog"))
    sentence = wrong(likelihood, tmp_path, "--pretrained_ckpt", few)
    assert "the model has no class 'eel', which images have; its classes are cat, dog" in sentence
    save_orders(tmp_path / "o.json", generate_orders("random", COUNT - 1, (1, 15), 4).astype(np.int64))
    sentence = wrong(likelihood, tmp_path, "--orders", tmp_path / "o.json", "--steps", 2)
    assert "holds 11, too few: 12 are needed" in sentence


def test_codes_that_have_changed_are_refused(likelihood: Command, folder: Path, tmp_path: Path) -> None:
    """Guards against figures of other codes: those in range can't be told by their values."""
    shutil.copytree(folder / "codes", tmp_path / "codes")
    codes = np.load(tmp_path / "codes" / "codes.npy", mmap_mode="r+")
    codes[0] = (codes[0] + 1) % 12
    codes.flush()
    sentence = wrong(likelihood, tmp_path, "--cached_path", tmp_path / "codes")
    assert "codes.npy is missing or damaged" in sentence


def test_a_search_needs_images_and_steps(find_schedule: Command) -> None:
    for arguments, message in (
        (("--num_images", 3), "3 images are too few"),
        (("--generation_steps", 17), "17 must lie between"),
        (("--generation_steps", 1), "needs 1 as the first group size"),
        (("--budget_sec", 0), "--budget_sec is 0"),
    ):
        status, _, errors = find_schedule(*arguments)
        assert status == 2
        assert message in errors.splitlines()[-1]


@pytest.mark.slow
def test_a_section_of_the_page(likelihood: Command, folder: Path, tmp_path: Path) -> None:
    """Made, replaced by its own second version, and followed by another; the hand-written text stays."""
    assert likelihood("--orders", "lpd", "raster", "halton", "--steps", 8, 4, "--baseline", "lpd")[0] == 0
    rows = json.loads((tmp_path / "out" / "likelihood.json").read_text())["cells"]
    evaluations = []
    for number, row in enumerate(rows):
        settings = {name: row[name] for name in ("order", "group_sizes", "proximity_threshold", "repulsion_threshold")}
        result = {"num_images": 9, "frechet_distance": row["bits_per_token"]["mean"] ** 2, "settings": settings}
        result["settings"]["cfg"] = 1.0
        evaluations.append(tmp_path / f"{number}.json")
        evaluations[-1].write_text(json.dumps(result))
    evaluated, other = (json.loads(evaluations[0].read_text()) for _ in range(2))
    other["settings"]["group_sizes"] = [1, 15]
    evaluations.append(tmp_path / "other.json")
    evaluations[-1].write_text(json.dumps(other))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "likelihood.md"
    page.write_text("# Page\n\nBy hand.\n")
    publish("one", "First", tmp_path / "out", [], evaluations, tmp_path)
    text = page.read_text()
    assert text.startswith("# Page\n\nBy hand.\n\n<!-- likelihood:one -->\n## First\n")
    assert "| 1 | all | 6 | +1.00 | 0.000 |" in text, "in the order of the bits, and the other cell left out"
    best = min(rows, key=lambda row: row["bits_per_token"]["mean"])
    assert "{mean:.3f} ± {stderr:.3f}".format(**best["bits_per_token"]) in text
    publish("two", "Second", tmp_path / "out", [], [], tmp_path)
    publish("one", "First again", tmp_path / "out", [], [], tmp_path)
    text = page.read_text()
    assert text.index("## First again") < text.index("## Second")
    assert "## First\n" not in text
    assert "rank correlation" not in text
    for name in ("one_steps", "one_curves", "one_positions", "one_frechet", "two_steps"):
        assert_not_blank(tmp_path / "docs" / "images" / f"likelihood_{name}.png")
    kept = json.loads((tmp_path / "benchmarks" / "results" / "likelihood_two.json").read_text())
    assert [row["name"] for row in kept["cells"]] == [row["name"] for row in rows]
    with pytest.raises(UserError, match="Two"):
        publish("Two", "Second", tmp_path / "out", [], [], tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        publish("two", "Second", tmp_path / "nowhere", [], [], tmp_path)
    before = page.read_text()
    evaluations[0].write_text(json.dumps(other | {"frechet_distance": "small", "settings": evaluated["settings"]}))
    with pytest.raises(UserError, match=r"results .*/0\.json is truncated or damaged"):
        publish("two", "Second", tmp_path / "out", [], evaluations, tmp_path)
    (tmp_path / "out" / "steps.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"steps\.png' can't be read"):
        publish("two", "Second", tmp_path / "out", [], [], tmp_path)
    (tmp_path / "out" / "likelihood.json").write_text(json.dumps({"cells": [1]}))
    with pytest.raises(UserError, match=r"likelihood\.json is truncated or damaged"):
        publish("two", "Second", tmp_path / "out", [], [], tmp_path)
    assert page.read_text() == before


def test_a_section_without_its_end_is_refused() -> None:
    """Guards against the rest of the page lost, by hand or by another section."""
    text = put("# Page\n", "one", "first")
    assert put(put(text, "two", "second"), "one", "again").count("<!-- ") == 4
    with pytest.raises(UserError, match="<!-- /likelihood:one -->"):
        put(text.replace("<!-- /likelihood:one -->", ""), "one", "again")
    with pytest.raises(UserError, match="<!-- /likelihood:one -->"):
        put("<!-- /likelihood:one -->\n" + text.replace("<!-- /likelihood:one -->", "By hand."), "one", "again")
