"""Evaluation: every image once and the same whatever the batch, the processes or a kill; inputs checked first."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.evaluation import evaluate as evaluate_module
from engine.evaluation import partial_results
from engine.evaluation.evaluate import evaluate, image_labels, image_seeds
from engine.evaluation.inputs import open_inputs
from engine.evaluation.outputs import append_results
from engine.scoring import statistics
from engine.scoring.metrics import score
from engine.scoring.statistics import FeatureStatistics, load_reference_statistics
from orders import generate_orders, save_orders
from orders.draw import OrderSpec
from orders.files import save_schedule
from tests.helpers.commands import ROOT
from tests.helpers.evaluation_case import (
    CLASSES,
    GROUP_SIZES,
    NUM_IMAGES,
    SIZE,
    Batch,
    eval_config,
    hooked,
    networks,
    run,
    toy_extractor,
    write_reference,
)
from tests.helpers.pictures import assert_shows
from tests.helpers.processes import ALONE, meeting_place, rank_variables
from util.data.images import ImageFiles, ImageFolder, open_images
from util.data.loading import image_batches
from util.errors import UserError
from util.files import sha256

SCORES = ("frechet_distance", "inception_score", "inception_score_std", "class_accuracy")
TIMES = ("sec_per_image", "images_per_sec")
FREE_SETTINGS = ("output_dir", "eval_bsz", "reference_statistics", "save_npz")
CASE = ROOT / "tests" / "helpers" / "evaluation_case.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted evaluation in one process."""
    folder = tmp_path_factory.mktemp("whole")
    write_reference(folder / "reference.npz")
    return folder / "out", run(folder / "out", save_npz=True)


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    write_reference(tmp_path / "reference.npz")
    return tmp_path / "out"


def png_bytes(folder: Path) -> dict[str, np.ndarray]:
    """The pictures by their numbers; their names say the class too."""
    return {path.name[:6]: np.asarray(Image.open(path)) for path in (folder / "images").glob("*.png")}


def assert_same(folder: Path, results: dict[str, Any], whole: tuple[Path, dict[str, Any]]) -> None:
    expected = png_bytes(whole[0])
    found = png_bytes(folder)
    assert sorted(found) == sorted(expected) == [f"{i:06}" for i in range(NUM_IMAGES)]
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert {name: results[name] for name in SCORES} == pytest.approx(
        {name: whole[1][name] for name in SCORES}, rel=1e-6
    )
    assert comparable(json.loads((folder / "results.json").read_text())) == comparable(whole[1])
    assert not list(folder.glob("partial-*")), "the partial state must go when the results are there"


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how a run came about: all but scores, times, places and processes."""
    settings = {key: value for key, value in results["settings"].items() if key not in FREE_SETTINGS}
    kept = {key: value for key, value in results.items() if key not in (*SCORES, *TIMES, "environment")}
    return kept | {"settings": settings, "reference": results["reference"]["sha256"], "keys": sorted(results)}


def start_case(output_dir: Path, *args: object, variables: Mapping[str, str] = {}) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, CASE, output_dir, *map(str, args)], env=os.environ | variables)


def stopping_after(batches: int, message: str = "stopped") -> Callable[..., None]:
    """Fails before a batch after so many others."""
    calls = iter(range(batches))

    def stop(*batch: object, **_: object) -> None:
        if next(calls, None) is None:
            raise RuntimeError(message)

    return stop


def test_batch_size_changes_nothing(output_dir: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    """An image's class, order and draws must not follow its place in the batch."""
    assert_same(output_dir, run(output_dir, eval_bsz=10), whole)


@pytest.mark.slow
def test_two_processes_make_the_images_and_scores_of_one(
    output_dir: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They also take over what one process left unfinished."""
    monkeypatch.setattr(partial_results, "SAVE_INTERVAL_S", 0)
    with pytest.raises(RuntimeError, match="stopped"):
        run(output_dir, eval_bsz=2, before_batch=stopping_after(1))
    with meeting_place(2) as variables:
        processes = [start_case(output_dir, 3, variables=variables | rank_variables(rank)) for rank in range(2)]
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = json.loads((output_dir / "results.json").read_text())
    assert results["environment"]["world_size"] == 2
    assert_same(output_dir, results, whole)


def test_killed_run_is_resumed_and_ends_the_same(output_dir: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    """After kill -9 nothing finished is made again, nothing is lost, and another batch size may finish the run."""
    assert start_case(output_dir, 4, 2).wait(timeout=120) == -signal.SIGKILL
    assert not (output_dir / "results.json").exists()
    made: list[int] = []

    results = run(output_dir, eval_bsz=5, before_batch=lambda batch: made.append(len(batch[0])))
    assert made == [5, 5, 5], "two batches of four were finished before the kill"
    assert_same(output_dir, results, whole)


@pytest.mark.parametrize("damage", ["no picture", "half a picture", "another picture", "half a part", "another part"])
def test_what_is_damaged_is_made_again(
    output_dir: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Guards against results of 35 of 40 images, and against a part that fails every rerun."""
    monkeypatch.setattr(partial_results, "SAVE_INTERVAL_S", 0)
    with pytest.raises(RuntimeError, match="stopped"):
        run(output_dir, before_batch=stopping_after(2), save_npz=True)
    (folder,) = output_dir.glob("partial-*")
    (path,) = folder.glob("png/000001*.png" if "picture" in damage else "part_00000000.npz")
    content = path.read_bytes()
    path.unlink()
    if damage.startswith("half"):
        path.write_bytes(content[: len(content) // 2])
    elif damage == "another part":
        np.savez(path, indices=np.arange(4))
    elif damage == "another picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "png/.000002.png.here.1.tmp").touch()
    made: list[int] = []
    results = run(output_dir, before_batch=lambda batch: made.append(len(batch[0])), save_npz=True)
    assert made == [4] * 5, "one of two batches was whole"
    assert_same(output_dir, results, whole)


def test_a_kill_between_pictures_and_results(
    output_dir: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against pictures that are made twice, or missing from the file for the ADM suite."""
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_module, "append_results", stopping_after(0, "killed"))
        with pytest.raises(RuntimeError, match="killed"):
            run(output_dir)
    assert len(list((output_dir / "images").glob("*.png"))) == NUM_IMAGES
    (picture,) = (output_dir / "images").glob("000004*.png")
    picture.unlink()
    made: list[int] = []
    assert_same(output_dir, run(output_dir, before_batch=lambda batch: made.append(len(batch[0]))), whole)
    assert made == [4] * 6, "all were in one part"


@pytest.mark.parametrize("name", ["images", "partial"])
def test_links_in_the_place_of_its_folders_are_refused(output_dir: Path, tmp_path: Path, name: str) -> None:
    """Guards against replacing or deleting what lies elsewhere."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000001.png").touch()
    if name == "partial":
        with pytest.raises(RuntimeError, match="stopped"):
            run(output_dir, before_batch=stopping_after(1))
        (folder,) = output_dir.glob("partial-*")
        shutil.rmtree(folder)
    else:
        folder = output_dir / "images"
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a symbolic link"):
        run(output_dir)
    assert (tmp_path / "mine" / "000001.png").exists()


def test_other_settings_or_weights_are_not_resumed(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixing images of two checkpoints or seeds would be a wrong score that nobody notices."""
    monkeypatch.setattr(partial_results, "SAVE_INTERVAL_S", 0)
    for fields in ({}, {"seed": 4}, {"cfg": 3.0}, {"order": "raster"}):
        with pytest.raises(RuntimeError, match="stopped"):
            run(output_dir, before_batch=stopping_after(2), **fields)
    folders = sorted(output_dir.glob("partial-*"))
    assert len(folders) == 4
    model, tokenizer = networks()
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-3
    config, _ = eval_config(output_dir, eval_bsz=4, cfg=2.0, save_images=True)
    inputs = open_inputs(config, model.config, ALONE, extractor=toy_extractor())
    with pytest.raises(RuntimeError, match="stopped"), hooked(stopping_after(2)):
        evaluate(model, tokenizer, config, inputs, ALONE)
    assert len(list(output_dir.glob("partial-*"))) == 5


def test_scores_equal_those_of_the_png_folder(whole: tuple[Path, dict[str, Any]]) -> None:
    """Features straight from decoded images must be those of the files: same rounding, same channel order."""
    folder, results = whole
    extractor, reference = toy_extractor(), load_reference_statistics(folder.parent / "reference.npz")
    statistics, all_logits = FeatureStatistics(extractor.feature_dim), []
    for images in image_batches(ImageFolder(folder / "images", SIZE, labelled=False), batch_size=5):
        features, logits = extractor(images.permute(0, 3, 1, 2))
        statistics.update(features)
        all_logits.append(logits)
    logits = torch.cat(all_logits)
    scores = score(statistics, logits, reference, "toy")
    scores["class_accuracy"] = np.mean(logits.argmax(1).numpy() == image_labels(NUM_IMAGES, CLASSES).numpy())
    assert {name: results[name] for name in SCORES} == pytest.approx({name: scores[name] for name in SCORES}, rel=1e-6)


def test_adm_file_is_shuffled_with_its_labels(whole: tuple[Path, dict[str, Any]]) -> None:
    """Sorted by class, the ADM evaluator's Inception Score would be capped; labels must follow their images."""
    images = png_bytes(whole[0])
    with np.load(whole[0] / "samples.npz", allow_pickle=False) as file:
        samples, labels = file["arr_0"], file["arr_1"]
    assert samples.shape == (NUM_IMAGES, SIZE, SIZE, 3)
    assert samples.dtype == np.uint8
    assert (np.diff(labels) < 0).any(), "sorted"
    by_bytes = {pixels.tobytes(): int(name[:6]) for name, pixels in images.items()}
    numbers = [by_bytes[pixels.tobytes()] for pixels in samples]
    assert sorted(numbers) == list(range(NUM_IMAGES))
    assert labels.tolist() == image_labels(NUM_IMAGES, CLASSES)[numbers].tolist()


def test_results_say_what_was_done(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    assert json.loads((folder / "results.json").read_text()) == results
    assert json.loads((folder / "results.jsonl").read_text()) == results
    reference = folder.parent / "reference.npz"
    assert results["reference"] == {"path": str(reference), "sha256": sha256(reference)}
    assert results["settings"]["cfg"] == 2.0
    assert results["extractor"]["name"] == "toy"
    assert results["sec_per_image"] > 0
    assert results["images_per_sec"] > 0
    assert results["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert "fid" not in results


def test_names_and_a_list_say_the_classes_of_pictures(whole: tuple[Path, dict[str, Any]], output_dir: Path) -> None:
    """The list beside the pictures is one that every command takes."""
    labels = image_labels(NUM_IMAGES, CLASSES).numpy()
    listed = open_images(whole[0] / "images" / "labels.csv", SIZE)
    assert isinstance(listed, ImageFiles)
    assert listed.paths == [f"{i:06}-class_{label}.png" for i, label in enumerate(labels)]
    assert [listed.classes[label] for label in listed.labels] == [f"class {label}" for label in labels]
    model, tokenizer = networks()
    config = eval_config(output_dir, num_images=CLASSES, feature_extractor=None, save_images=True)[0]
    names = ("tench, Tinca tinca", "Äpfel/Birnen", "../..", "a" * 99, "x")
    evaluate(model, tokenizer, config, open_inputs(config, model.config, ALONE, names), ALONE)
    written = sorted(path.name for path in (output_dir / "images").glob("*.png"))
    assert written == [
        "000000-tench_Tinca_tinca.png", "000001-Äpfel_Birnen.png", "000002.png", f"000003-{'a' * 40}.png",
        "000004-x.png",
    ]  # fmt: skip


def test_grid_shows_the_first_images_of_each_class(whole: tuple[Path, dict[str, Any]]) -> None:
    images, labels = png_bytes(whole[0]), image_labels(NUM_IMAGES, CLASSES)
    firsts = [int((labels == label).nonzero()[0]) for label in range(CLASSES)]
    shown = [images[f"{first + i:06}"] for first in firsts for i in range(4)]
    assert_shows(whole[0] / "grid.png", shown, columns=4).assert_labelled()


def test_every_image_gets_its_own_class_order_and_seed(output_dir: Path) -> None:
    """What the decode loop is asked for, against the rule: image i has class i·C // N, order i, seed (seed, i)."""
    asked: dict[str, list] = {"labels": [], "orders": [], "seeds": []}

    def record(batch: Batch) -> None:
        for name, values in zip(asked, batch, strict=True):
            asked[name] += values.tolist()

    run(output_dir, before_batch=record)
    assert {len(values) for values in asked.values()} == {NUM_IMAGES + 1}, "the last batch is filled up by a copy"
    for values in asked.values():
        assert values.pop() == values[-1]
    assert asked["labels"] == [i * CLASSES // NUM_IMAGES for i in range(NUM_IMAGES)]
    assert asked["orders"] == generate_orders("lpd", NUM_IMAGES, GROUP_SIZES, SIZE // 4, seed=3).tolist()
    assert asked["seeds"] == image_seeds(3, torch.arange(NUM_IMAGES)).tolist()
    assert len(set(asked["seeds"])) == NUM_IMAGES
    assert not set(asked["seeds"]) & set(image_seeds(4, torch.arange(NUM_IMAGES)).tolist())

    file_orders = generate_orders("random", NUM_IMAGES + 5, GROUP_SIZES, SIZE // 4, seed=8)
    save_orders(output_dir.parent / "orders.json", file_orders)
    asked["orders"].clear()
    results = run(output_dir, before_batch=record, lpd_order_file=output_dir.parent / "orders.json")
    assert asked["orders"][:NUM_IMAGES] == file_orders[:NUM_IMAGES].tolist()
    assert results["order_file_sha256"] == sha256(output_dir.parent / "orders.json")
    assert len((output_dir / "results.jsonl").read_text().splitlines()) == 2


def test_results_say_which_orders_were_used(output_dir: Path) -> None:
    """Guards against settings that name the kind and the thresholds of the flags where a file decided."""

    def used(**fields: Any) -> list[Any]:
        results = run(output_dir, feature_extractor=None, reference_statistics=None, num_images=1, **fields)
        return [results["settings"][name] for name in ("order", "proximity_threshold", "repulsion_threshold")]

    assert used() == ["lpd", 1.0, 1], "the default threshold as a number"
    assert used(order="raster")[0] == "raster"
    spec = OrderSpec("lpd_near_only", (SIZE // 4, SIZE // 4), GROUP_SIZES, 0.5, 2, seed=8)
    steps, orders = len(GROUP_SIZES), spec.draw(np.arange(2))
    recorded, bare, published = (
        output_dir.parent / name
        for name in ("recorded.safetensors", "orders.json", f"res{SIZE}_steps{steps}_repulsion3.json")
    )
    save_orders(recorded, orders, spec)
    save_orders(bare, orders)
    save_orders(published, orders)
    assert used(lpd_order_file=recorded) == ["lpd_near_only", 0.5, 2]
    assert used(lpd_order_file=bare) == [None, None, None]
    assert used(lpd_order_file=published) == ["lpd", 1.0, 3]
    mixed = OrderSpec("lpd", (SIZE // 4, SIZE // 4), (1, 5, 10), (1.0, None, 2.0), (0, 1, 2), seed=8)
    save_schedule(output_dir.parent / "schedule.json", mixed, {})
    schedule = {"schedule_file": output_dir.parent / "schedule.json", "group_sizes": None}
    assert used(**schedule) == ["lpd", [1.0, None, 2.0], [0, 1, 2]]
    settings = json.loads((output_dir / "results.json").read_text())["settings"]
    assert (settings["group_sizes"], settings["generation_steps"]) == ([1, 5, 10], 3)


@pytest.mark.parametrize(("num", "classes"), [(50_000, 1000), (23, 5), (3, 10), (10, 10), (1, 1)])
def test_labels_are_sorted_and_balanced(num: int, classes: int) -> None:
    labels = image_labels(num, classes)
    counts = torch.bincount(labels, minlength=classes)
    assert labels.tolist() == sorted(labels.tolist())
    assert int(counts.max() - counts.min()) <= 1
    if num == 50_000:
        assert torch.equal(labels, torch.arange(num) // 50)


@pytest.mark.parametrize("num_images", [1, 2, 4])
def test_very_few_images(output_dir: Path, num_images: int) -> None:
    """No figure from nothing: one image has no covariance, ten splits need ten images, the only batch is a warm-up."""
    results = run(output_dir, num_images=num_images)
    assert results["sec_per_image"] is None
    assert "inception_score" not in results
    assert not results.get("conventions"), "of figures that are not there"
    assert ("frechet_distance" in results) == (num_images > 1)
    assert json.loads((output_dir / "results.json").read_text())["num_images"] == num_images


def test_images_without_scores(output_dir: Path) -> None:
    results = run(output_dir, feature_extractor=None, reference_statistics=None, save_images=False, save_npz=True)
    assert results["extractor"] is None
    assert not {*SCORES, "fid"} & results.keys()
    assert (output_dir / "samples.npz").exists()
    assert not (output_dir / "images").exists(), "not asked for"


def test_the_model_keeps_its_mode_and_the_random_state(output_dir: Path) -> None:
    """Evaluation in mid-training must not switch dropout off or change the training's random numbers."""
    model, tokenizer = networks()
    model.train()
    before = torch.get_rng_state()
    config = eval_config(output_dir, num_images=3, feature_extractor=None)[0].for_epoch(7)
    evaluate(model, tokenizer, config, open_inputs(config, model.config, ALONE), ALONE, record={"epoch": 7})
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert json.loads((output_dir / "eval_epoch0007" / "results.json").read_text())["record"] == {"epoch": 7}


def test_a_folder_with_other_files_is_not_replaced(output_dir: Path) -> None:
    """Images of an earlier evaluation are replaced, a user's folder never."""
    (output_dir / "images").mkdir(parents=True)
    stale = output_dir / "images" / "000099.png"
    stale.write_bytes(b"")
    run(output_dir, num_images=3)
    assert not stale.exists()
    (output_dir / "images" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"holiday\.jpg"):
        run(output_dir, num_images=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_images": 0}, "--num_images is 0"),
        ({"eval_bsz": 0}, "--eval_bsz is 0"),
        ({"order": "spiral"}, "order is 'spiral'"),
        ({"seed": -1}, "--seed is -1"),
        ({"cfg": 0.5}, "cfg is 0.5"),
        ({"cfg_schedule": "cubic"}, "cfg_schedule is 'cubic'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": 13}, "top_k is 13"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"group_sizes": (1, 3, 5)}, "sum to 9"),
        ({"classes": ("a", "b")}, "2 class names"),
        ({"reference_statistics": Path("no_such.npz")}, r"statistics no_such\.npz does not exist"),
        ({"lpd_order_file": Path("no_such.json")}, r"no_such\.json does not exist"),
        ({"feature_extractor": "no_such.pt", "reference_statistics": None}, r"extractor 'no_such\.pt'"),
        ({"inception_path": Path("no_such.pth"), "feature_extractor": "inception-v3-compat"}, r"no_such\.pth does not"),
        ({"feature_extractor": None}, "used without a feature extractor"),
        ({"adm_suite": True}, "needs mu_s and sigma_s of 2023 features"),
        ({"adm_suite": True, "num_images": 3}, "num_images 3"),
        ({"adm_suite": True, "reference_statistics": None}, "needs the feature extractor"),
    ],
)
def test_mistakes_are_found_before_anything_is_generated(
    output_dir: Path, fields: dict[str, Any], message: str
) -> None:
    def never(batch: Batch) -> None:
        raise AssertionError("generation started")

    with pytest.raises(UserError, match=message):
        run(output_dir, before_batch=never, **fields)
    assert not output_dir.exists()


def test_adm_suite(output_dir: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, dict[str, Any]]) -> None:
    """sFID of the spatial features; every image is inside a reference that holds the same images, and the reverse."""
    monkeypatch.setattr(evaluate_module, "SPATIAL_DIM", 4)
    monkeypatch.setattr(statistics, "SPATIAL_DIM", 4)
    toy, last = toy_extractor(), {}

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last["spatial"] = images[:, 0, 0, :4].float()
        return toy.forward(images)

    extractor = replace(toy, forward=forward, take_spatial=lambda: last.pop("spatial"))
    images = np.stack([pixels for _, pixels in sorted(png_bytes(whole[0]).items())])
    spatial = images[:, 0, :4, 0].astype(np.float64)
    with np.load(output_dir.parent / "reference.npz") as file:
        arrays = dict(file)
    arrays |= {"mu_s": spatial.mean(0) + 1, "sigma_s": np.cov(spatial, rowvar=False), "arr_0": images}
    np.savez(output_dir.parent / "reference.npz", **arrays)
    results = run(output_dir, adm_suite=True, extractor=extractor)
    assert results["sfid"] == pytest.approx(4)
    assert (results["precision"], results["recall"]) == (1, 1)
    assert "float16" in results["conventions"]["precision"], "the suite's own figures differ"
    assert results["frechet_distance"] == pytest.approx(whole[1]["frechet_distance"], rel=1e-6)


def test_too_few_orders_in_the_file(output_dir: Path) -> None:
    save_orders(output_dir.parent / "o.json", generate_orders("random", 5, GROUP_SIZES, SIZE // 4))
    with pytest.raises(UserError, match="holds 5 orders"):
        run(output_dir, lpd_order_file=output_dir.parent / "o.json")


def test_a_kill_after_the_line_is_written_writes_no_second(tmp_path: Path) -> None:
    """The call that resumes makes no images, and measures another speed."""
    path, results = tmp_path / "results.jsonl", {"fid": 2.0, "images_per_sec": 7.0, "group_sizes": (1, 3)}
    assert append_results(path, results, again=False)["group_sizes"] == [1, 3]
    assert append_results(path, results | {"images_per_sec": None}, again=True)["images_per_sec"] == 7.0
    assert len(path.read_text().splitlines()) == 1
    append_results(path, results, again=False)
    append_results(path, results | {"fid": 3.0}, again=True)
    assert [json.loads(line)["fid"] for line in path.read_text().splitlines()] == [2.0, 2.0, 3.0]
