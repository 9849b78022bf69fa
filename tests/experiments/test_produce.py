"""The experiment on photographs of fruit and vegetables: its data, cells, contexts and page, and all of it, tiny."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from experiments import cells, driver
from experiments.cells import Model
from experiments.pages import distances
from experiments.produce import contexts, data, naming, page, run
from experiments.produce.report import REPORT
from experiments.produce.scales import EPOCHS, FINE, FINE_EPOCHS, FULL, MAIN, TINY
from scripts.stages import Stages
from tests.experiments.test_cifar10 import StagesUntil, command_in_process
from tests.helpers.commands import ROOT
from tests.helpers.commands import run as run_command
from tests.helpers.experiment_results import photo, produce_results, write_finished_run
from tests.helpers.pictures import assert_not_blank
from util.data.images import open_images, write_image_archive
from util.dist import Dist
from util.errors import UserError


def write_dataset(folder: Path, places: list[str]) -> None:
    rng = np.random.default_rng(0)
    for place in places:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(rng, 100, 80, 4).save(path, quality=95)


def test_archive_from_the_public_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against sorts taken for classes, packages among the photos, and another crop, order or split."""
    sorts = [
        f"{part}/Fruit/Apple/{sort}/{sort}_{n:03}.jpg" for part in data.PARTS for sort in ("B", "A") for n in (2, 1)
    ]
    other = ["train/Vegetables/Leek/Leek_001.jpg", "val/Packages/Milk/Milk_001.jpg", "test/Fruit/Kiwi/Kiwi_001.jpg"]
    write_dataset(tmp_path / "dataset", [*sorts, *other])
    assert run_command(data.main, tmp_path / "dataset", tmp_path / "photos.npz") == 0
    assert "14 photos in 3 classes" in capsys.readouterr().out
    with np.load(tmp_path / "photos.npz") as file:
        arrays = dict(file)
    assert arrays["classes"].tolist() == ["Apple", "Kiwi", "Leek"]
    assert arrays["labels"].tolist() == [0] * 12 + [1, 2]
    assert arrays["split"].tolist() == (np.random.default_rng(0).random(14) < 0.15).astype(int).tolist()
    files = [arrays["data"][a:b].tobytes() for a, b in zip(arrays["offsets"], arrays["offsets"][1:], strict=False)]
    in_order = sorted(place for place in sorts)  # test, train, val
    for place, content in zip(in_order, files, strict=False):
        with Image.open(tmp_path / "dataset" / place) as image:
            expected = image.crop((10, 0, 90, 80)).resize((64, 64), Image.Resampling.LANCZOS)
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))
            assert JpegImagePlugin.get_sampling(image) == 0, "4:4:4"
            assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 3
    assert run_command(data.main, tmp_path / "dataset" / "train", tmp_path / "photos.npz") == 2
    assert "give the folder named dataset" in capsys.readouterr().err
    assert run_command(data.main, tmp_path / "dataset", tmp_path / "photos") == 2
    write_dataset(tmp_path / "dataset", ["train/Fruit/of_no_class.jpg"])
    assert run_command(data.main, tmp_path / "dataset", tmp_path / "again.npz") == 0
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "photos.npz").read_bytes()
    assert run_command(data.main, tmp_path / "dataset", "/proc/none/photos.npz") == 2
    assert "output file /proc/none/photos.npz can't be used" in capsys.readouterr().err


def test_statistics_are_of_equally_many_photos_of_each_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(13):
        file = io.BytesIO()
        photo(rng, 64, 64, 3).save(file, "PNG")
        files.append(file.getvalue())
    write_image_archive(tmp_path / "a.npz", files, [0] * 10 + [1] * 3, ["many", "few"], [0] * 13)
    run.write_balanced(f"{tmp_path}/a.npz", 64, 5, tmp_path / "b.npz")
    images, balanced = open_images(tmp_path / "a.npz", 64), open_images(tmp_path / "b.npz", 64)
    assert balanced.labels.tolist() == [0] * 5 + [1] * 5
    for index, taken in enumerate([0, 2, 4, 6, 8, 10, 11, 12, 10, 11]):
        assert (balanced.load(index) == images.load(taken)).all()


GUIDANCE = {(model.name, order): 2.0 for model in FULL.models for order in FULL.orders}


def test_cells_of_every_model() -> None:
    """Guards against checkpoints that are not kept, doubled cells, and a seed on which guidance was tuned."""
    tuning, reported = cells.tuning_cells(FULL), cells.table_cells(FULL, GUIDANCE, fid=False)
    every = [*tuning, *reported]
    assert len({cell.name for cell in every}) == len(every)
    assert {cell.seed for cell in tuning}.isdisjoint({cell.seed for cell in reported})
    assert all(sum(cell.group_sizes()) == 64 and len(cell.group_sizes()) == cell.steps for cell in every)
    kept = int(FULL.flag("lpd", "--save_intermediate_freq"))
    assert {cell.epoch for cell in every} == {None, EPOCHS // 4, EPOCHS // 2}
    assert all(cell.epoch is None or cell.epoch % kept == 0 for cell in every)
    assert {cell.training for cell in every} == set(FULL.trainings)
    seeds = Counter((cell.model.name, cell.order, cell.steps) for cell in reported if cell.kind in ("table", "repeat"))
    for model in ("lpd_random", "lpd_mixed"):
        assert {seeds[model, order, steps] for order, steps in FULL.repeated} == {3}
        assert {seeds[model, order, steps] > 0 for order in MAIN for steps in FULL.steps} == {True}
    assert {seeds[f"lpd_random_epoch{EPOCHS // 2}", order, 16] for order in ("lpd", "random", "halton")} == {3}
    assert {order for model, order, _ in seeds if model == "lpd_random"} == set(FULL.orders)
    assert Model("a", 3).checkpoint(Path("x")) == Path("x/a/checkpoint-3.pth")


def test_cells_of_fine_tokens() -> None:
    """Guards against cells of checkpoints that are not kept, and schedules of another grid."""
    guidance = {(model.name, order): 2.0 for model in FINE.models for order in FINE.orders}
    every = [*cells.tuning_cells(FINE), *cells.table_cells(FINE, guidance, fid=False)]
    assert {cell.training for cell in every} == set(FINE.trainings)
    assert all(sum(cell.group_sizes()) == 256 and len(cell.group_sizes()) == cell.steps for cell in every)
    assert FINE.tuning_steps in FINE.steps
    assert (FINE.flag("tokenizer", "--stride"), FINE.flag("tokenizer", "--codebook_size")) == ("4", "512")
    assert FINE.trainings["lpd_mixed"] == ("--train_orders", "random:0.5", "lpd:0.5")
    kept = int(FINE.flag("lpd", "--save_intermediate_freq"))
    assert {cell.epoch for cell in every} == {None, kept, 2 * kept}
    assert 4 * kept == FINE_EPOCHS


def test_a_longer_training_has_its_checkpoints_at_the_same_shares() -> None:
    """Guards against cells of checkpoints that a run of other --epochs never keeps."""
    longer = FULL.for_epochs(10 * EPOCHS)
    assert [model.epoch for model in longer.models] == [None, None, 10 * EPOCHS // 4, 10 * EPOCHS // 2]
    assert longer.flag("lpd", "--epochs") == str(10 * EPOCHS)
    assert longer.flag("lpd", "--save_intermediate_freq") == str(10 * EPOCHS // 4)
    assert longer.models[0].checkpoint(Path("x")).name == "checkpoint-last.pth"
    for epochs in (0, -4, EPOCHS + 1):
        with pytest.raises(UserError, match=f"--epochs is {epochs}; it must be a positive multiple of 4"):
            FULL.for_epochs(epochs)


def test_contexts_of_trainings_and_orders() -> None:
    """Guards against figures of the wrong order, and a training that ignores its shares."""
    trainings = {"random": {"random": 1.0}, "half": {"random": 0.5, "lpd": 0.5}, "lpd": {"lpd": 1.0}}
    found = contexts.measure_contexts(64, 8, ("lpd", "random", "raster"), (16, 8), trainings)
    assert json.loads(json.dumps(found)) == found
    rows = {(order, steps): values for order, steps, *values in contexts.context_rows(found)}
    known, nearest, clustering, at_random = range(4)
    assert rows["random", 16][at_random] == pytest.approx(0.5, abs=0.05)
    assert rows["raster", 16][at_random] < 0.05
    assert rows["raster", 16][clustering] > rows["random", 16][clustering] + 0.1
    assert rows["lpd", 16][known] > rows["random", 16][known]
    assert rows["lpd", 16][nearest] < rows["random", 16][nearest]
    for name in ("random", "half", "lpd"):
        lines = found["training"][name]
        assert len(lines["known"]) == len(lines["known_neighbours"]) == 8
    clustered = {name: np.mean(lines["clustering"]) for name, lines in found["training"].items()}
    assert clustered["half"] == pytest.approx((clustered["random"] + clustered["lpd"]) / 2, abs=0.01)
    assert clustered["lpd"] > clustered["random"] + 0.05
    random = found["training"]["random"]
    assert np.abs(np.array(random["known"]) - random["known_neighbours"]).max() < 0.03, "what chance gives"


def test_verdicts_count_the_spread_of_seeds() -> None:
    assert page.verdict([10.0, 10.2], [11.0, 11.2]).startswith("**wins** -1.00")
    assert page.verdict([11.0, 11.2], [10.0, 10.2]).startswith("**loses** +1.00")
    assert page.verdict([10.0, 12.0], [11.5, 12.5]).startswith("ties")
    assert page.verdict([10.0], [11.0, 11.2]) == "–"


def test_page_and_plots_from_the_json_alone(tmp_path: Path) -> None:
    folder = REPORT.folder(tmp_path)
    found = produce_results()
    (folder / "produce.json").write_text(json.dumps(found))
    REPORT.draw(folder)
    text = (folder / "produce.md").read_text()
    for line in (
        "| lpd_random | random | **loses** +1.00 ± 0.02 | – | **loses** +1.00 ± 0.02 |",
        "| lpd_mixed | random | **wins** -1.00 ± 0.02 |",
        f"| lpd_random_epoch{EPOCHS // 2} | random | – | – | **loses** +1.00 ± 0.02 | – | **loses** +1.00 ± 0.02 |",
        "| lpd_random | 2.500 | 5.250 | 5.000 | 2 |",
        "| lpd_random | pixels | 30.00 | 28.00 | 7.0% |",
        "| locality-aware | 4.500 |",
        "| model \\ order | Halton | locality-aware | random |",
        "1 Tomato, 2 Kiwi",
        "75.0% of the test photos",
    ):
        assert line in text
    pictures = {path.name for path in (folder / "images").iterdir()}
    drawn = {
        "produce_loss.png",
        "produce_clustering.png",
        "produce_quality_lpd_random.png",
        "produce_quality_lpd_mixed.png",
    }
    assert drawn <= pictures
    for name in pictures:
        assert_not_blank(folder / "images" / name)
    assert distances(found["cells"], "lpd", 16, "lpd_mixed") == pytest.approx([19.0, 19.01, 19.02])
    part = found | {
        "cells": found["cells"][:5],
        "neighbours": {},
        "likelihood": {},
        "contexts": None,
        "unlabelled": None,
    }
    assert "**wins**" not in page.page(part)
    assert "A child" not in page.page(part)
    page.plot(part, folder / "images")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the tiny experiment on made-up photos; gives its exit status and what it and its stages printed."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        return run_command(run.EXPERIMENT.main, "--device", "cpu", "--scale", "tiny", *arguments), *capfd.readouterr()

    return call


def write_photos(path: Path, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    files, labels = [], [0, 1] * 20
    for label in labels:
        file = io.BytesIO()
        photo(rng, 64, 64, 3 + 4 * label).save(file, "JPEG")
        files.append(file.getvalue())
    write_image_archive(path, files, labels, ["fine", "coarse"], [0] * 30 + [1] * 10)


def test_a_folder_holds_work_of_one_kind(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """Guards against statistics and judges of other photos than those that the models are trained on."""
    for name, seed in (("a", 0), ("b", 1)):
        write_photos(tmp_path / f"{name}.npz", seed)
        for split in ("train", "test"):
            path = tmp_path / name / split / "Apple" / "1.bmp"  # of the same size, whatever it shows
            path.parent.mkdir(parents=True)
            photo(np.random.default_rng(seed), 64, 64, 3).save(path)
    for suffix in (".npz", ""):
        a, b = (tmp_path / f"{name}{suffix}" for name in "ab")
        arguments = "--output_dir", tmp_path / f"out{suffix}", "--stage", "contexts", "--data"
        for _ in range(2):
            assert command(*arguments, a)[0] == 0
        made = {path: path.read_bytes() for path in (tmp_path / f"out{suffix}").iterdir()}
        for words, named in (
            ((b,), "other photos than those of --data"),
            ((a, "--scale", "full"), "--scale tiny, not full"),
            ((a, "--epochs", 4), "--epochs 2, not 4"),
        ):
            status, _, errors = command(*arguments, *words)
            assert (status, f"holds work with {named}; give another" in errors) == (2, True)
        assert made == {path: path.read_bytes() for path in (tmp_path / f"out{suffix}").iterdir()}


def test_plan_counts_the_photos_that_are_used(command: Callable[..., tuple[int, str, str]]) -> None:
    for scale, model, photos in (
        ("tiny", "lpd_debug", "2 epochs of 40"),
        ("fine", "lpd_mini", f"{FINE_EPOCHS} epochs of 3,111"),
    ):
        status, printed, _ = command("--data", "anything", "--plan", "--scale", scale)
        assert (status, f"training lpd_mixed: {model}, {photos} photos, " in printed) == (0, True)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run with a report, beside its photos."""
    write_photos(tmp_path / "photos.npz")
    torch.save({"model": {"a": torch.ones(1)}, "metadata": {"test_accuracy": 0.5}}, tmp_path / "classifier.pt")
    write_finished_run(tmp_path / "out", tmp_path / "classifier.pt")
    return tmp_path / "out"


def test_the_report_names_the_file_that_is_damaged_and_keeps_the_page(
    finished: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Guards against a good report that is overwritten by figures that give no page."""
    arguments = "--data", finished.parent / "photos.npz", "--output_dir", finished, "--stage", "report"
    status, _, errors = command(*arguments)
    assert status == 0, errors
    report = {path: path.read_bytes() for path in (finished / "report").rglob("produce.*")}
    assert len(report) == 2
    cell = cells.tuning_cells(TINY)[0].name
    results = json.loads((finished / "eval" / cell / "results.json").read_text())
    for name, content in (
        ("tokenizer/metrics.json", {}),
        ("floors/reference_real.json", {}),
        ("contexts.json", {}),
        (f"eval/{cell}/results.json", results | {"settings": {}}),
        (f"eval/{cell}/results.json", {name: value for name, value in results.items() if name != "environment"}),
        ("lpd_mixed/checkpoint-last.json", {}),
    ):
        whole = (finished / name).read_text()
        (finished / name).write_text(json.dumps(content))
        status, _, errors = command(*arguments)
        assert (status, f"{name} is truncated or damaged" in errors) == (2, True), (name, errors)
        (finished / name).write_text(whole)
    for name, content in (  # which only the page or a plot finds odd
        ("floors/reference_real.json", {"extractor": "net", "frechet_distance": "small"}),
        ("contexts.json", {"decoding": {}, "training": {"lpd": {}}}),
    ):
        whole = (finished / name).read_text()
        (finished / name).write_text(json.dumps(content))
        status, _, errors = command(*arguments)
        assert (status, f"the figures in {finished} give no page" in errors) == (2, True), (name, errors)
        (finished / name).write_text(whole)
    assert report == {path: path.read_bytes() for path in report}


class NotedStages(Stages):
    """Stages that only note that they ran."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.ran: list[str] = []

    def run(self, name: str, action: Callable[[], None], command: str, always: bool = False) -> None:
        super().run(name, lambda: self.ran.append(name), command, always)

    def command(self, name: str, *words: str | Path, always: bool = False, **_: Any) -> None:
        self.run(name, lambda: None, " ".join(map(str, words)), always)


def test_what_was_measured_of_other_weights_or_steps_is_done_again(finished: Path) -> None:
    """Guards against figures and pictures of an earlier model beside those of the present one."""
    stages, first = NotedStages(finished), TINY.models[0]

    def ran(stage: Callable[[driver.Call], None], **changes: Any) -> list[str]:
        stages.ran.clear()
        scale = dataclasses.replace(TINY, models=(first,), **changes)
        stage(driver.Call(finished, scale, Dist(0, 1, torch.device("cpu")), stages, ("", "")))
        return stages.ran

    for stage in (run.likelihood, run.pictures, run.contexts):
        assert [len(ran(stage)), len(ran(stage))] == [1, 0]
    first.checkpoint(finished).write_bytes(b"trained again")
    assert ran(run.likelihood) == [f"likelihood {first.name}"]
    assert ran(run.pictures) == ["pictures"]
    assert ran(run.contexts) == []
    for stage, changes in (
        (run.pictures, {"tuning_steps": 16}),
        (run.pictures, {"seeds": (7,)}),
        (run.contexts, {"stride": 4}),
        (run.contexts, {"steps": (16,)}),
        (run.likelihood, {"steps": (16,)}),
    ):
        ran(stage)
        assert len(ran(stage, **changes)) == 1, changes


def test_a_stop_signal_between_commands_asks_to_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Guards against the status of a signal, on which no launcher starts again, in stages that are no commands."""
    write_photos(tmp_path / "photos.npz")
    arguments = "--data", tmp_path / "photos.npz", "--output_dir", tmp_path / "out", "--stage", "contexts"
    with monkeypatch.context() as patch:
        patch.setattr(run, "measure_contexts", lambda *_: signal.raise_signal(signal.SIGUSR1))
        assert command(*arguments)[0] == 75
    assert command(*arguments)[0] == 0


@pytest.mark.slow
def test_recipe_from_photos_to_page_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Guards against a stage that does not fit the one before it, a repeated stage, and cells generated twice."""
    monkeypatch.setattr(Stages, "command", command_in_process)
    write_photos(tmp_path / "photos.npz")
    arguments: tuple[object, ...] = ("--data", tmp_path / "photos.npz", "--output_dir", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "Stages", lambda out, _: StagesUntil(out, 1))
        status, printed, errors = command(*arguments)
    assert status == driver.OUT_OF_TIME, errors[-3000:]
    assert "before the stage 'codes'; run the same command again" in printed
    status, printed, errors = command(*arguments)
    assert status == 0, errors[-3000:]
    found = json.loads((tmp_path / "out" / "report" / "produce.json").read_text())
    counts = Counter((row["kind"], row["model"]) for row in found["cells"])
    assert counts["table", "lpd_random"] == len(TINY.orders) * len(TINY.steps)
    assert counts["table", "lpd_mixed"] == 8
    assert counts["table", "lpd_random_epoch1"] == 3
    assert set(found["neighbours"]) == set(found["likelihood"]) == {model.name for model in TINY.models}
    assert all("val_loss" in found["trainings"][name]["loss_curve"][-1] for name in TINY.trainings)
    losses = {found["trainings"][name]["loss_curve"][0]["loss"] for name in TINY.trainings}
    assert len(losses) == len(TINY.trainings), "the orders differ"
    assert all(sorted(found["unlabelled"][kind].values()) == ["coarse", "fine"] for kind in naming.GRIDS)
    assert found["unlabelled"]["named"] == []
    text = (tmp_path / "out" / "report" / "produce.md").read_text()
    assert "no figure here means anything" in text
    names = ("unlabelled", f"samples_{TINY.tuning_steps}", "loss", "known_neighbours")
    for name in names:
        assert_not_blank(tmp_path / "out" / "report" / "images" / f"produce_{name}.png")
    assert_not_blank(tmp_path / "out" / naming.GRIDS["photos"])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[enl]*/*/*.json")}
    status, printed, errors = command(*arguments)
    assert status == 0, errors[-3000:]
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[enl]*/*/*.json")}
    with pytest.raises(UserError, match="--scale tiny"):
        REPORT.publish(tmp_path / "out" / "report", "x", tmp_path / "repository")
