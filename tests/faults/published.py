"""The commands under attack that run whole experiments, put results into the repository, or start jobs; their inputs.

The repository is the folder `repository` of the inputs, the hub a class of this file, and no job or suite is started.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from huggingface_hub.utils import validate_repo_id
from PIL import Image

import engine.hub.__main__
import engine.hub.export
import experiments.reports
import scripts.cli.run
import scripts.demo
import scripts.gpu_suite
import scripts.publish_likelihood
from experiments import cells
from experiments.cifar10.report import REPORT as CIFAR10_REPORT
from experiments.cifar10.run import EXPERIMENT as CIFAR10
from experiments.produce import data
from experiments.produce.report import REPORT as PRODUCE_REPORT
from experiments.produce.run import EXPERIMENT as PRODUCE
from experiments.produce.scales import TINY
from tests.experiments import test_cifar10, test_produce
from tests.faults.results import Command, digest, file_digest, nothing
from tests.helpers.commands import ROOT
from tests.scripts.test_gpu_suite import write_suite
from util.checkpoint import LAST
from util.files import write_json

REPOSITORY = Path("repository")
_TINY = "--data pictures.npz --scale tiny --device cpu"


def archive(out: Path, said: str) -> Any:
    with np.load(out / "photos.npz") as file:
        return digest(file[name].tobytes() for name in sorted(file))


def contexts(out: Path, said: str) -> Any:
    left = sorted(path.name for path in out.iterdir())
    return file_digest(out / "contexts.json"), list(json.loads((out / "stages.json").read_text())), left


def published(*names: str) -> Any:
    return lambda out, said: [file_digest(out / name) for name in names]


def printed(out: Path, said: str) -> Any:
    return said


def sound_script(said: str) -> bool:
    """Whether what `scripts/cli/run.py` printed is options of one word each, two commands, and comments."""
    lines = [line for line in said.splitlines() if line]
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines if line.startswith("#SBATCH")]
    commands = [shlex.split(line)[0] for line in lines if not line.startswith("#")]
    single = all(len(words) == 1 and words[0].startswith("--") for words in options)
    return single and commands in (["export", "srun"], ["export", "exec"])


class Hub:
    """In the place of the hub's client: tells what would be uploaded."""

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> Any:
        validate_repo_id(repo)
        return SimpleNamespace(repo_id=repo)

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        for name in allow_patterns:
            if (folder_path / name).exists():
                print(name, file_digest(folder_path / name))


PUBLISHED = (
    Command("produce.data", data.main, "shop OUT/photos.npz", archive),
    # The stage that needs nothing from the others; all of them take minutes.
    Command(
        "produce.run", PRODUCE.main, f"{_TINY} --stage contexts --output_dir OUT", contexts, until="stages.json"
    ),
    Command(
        "produce.run report", PRODUCE.main, f"{_TINY} --stage report --output_dir produced",
        published("produced/report/produce.md"), in_place=True,
    ),
    Command("cifar10.run", CIFAR10.main, f"{_TINY} --output_dir OUT", nothing, measures=True),
    Command(
        "produce.report", PRODUCE_REPORT.main, "report_produce --publish=x",
        published("report_produce/produce.md", "repository/docs/produce.md"), in_place=True,
    ),
    Command(
        "cifar10.report", CIFAR10_REPORT.main, "report_cifar10 --publish=x",
        published("report_cifar10/cifar10.md", "repository/docs/cifar10.md"), in_place=True,
    ),
    Command(
        "publish_likelihood", scripts.publish_likelihood.main,
        "digits --title=Digits --likelihood=likelihood --schedules=found/schedule.json "
        "--evaluations=evaluated/results.json",
        published(
            "repository/docs/likelihood.md", "repository/benchmarks/results/likelihood_digits.json",
            *(f"repository/docs/images/likelihood_digits_{plot}.png" for plot in scripts.publish_likelihood.PLOTS),
        ), in_place=True,
    ),
    Command("gpu_suite", scripts.gpu_suite.main, "--output_dir OUT --device cpu", nothing, measures=True),
    Command(
        "gpu_suite publish", scripts.gpu_suite.main, "--output_dir suite --publish x",
        published("repository/README.md", "repository/benchmarks/results/latency_x.json"), in_place=True,
    ),
    Command("hub push", engine.hub.__main__.main, "push exported user/model", printed),
    Command("demo", scripts.demo.main, "--output_dir OUT --device cpu --quick", nothing, measures=True),
    Command("run.py", scripts.cli.run.main, "--dry_run bash train.sh", printed, sound=sound_script),
)  # fmt: skip


def keep_to_the_inputs() -> None:
    """Let these commands write to the repository among the inputs, and reach no hub."""
    for module in (experiments.reports, scripts.publish_likelihood, scripts.gpu_suite):
        vars(module)["ROOT"] = REPOSITORY
    vars(engine.hub.export)["HfApi"] = Hub


def write_published_inputs() -> None:
    """Photographs of a shop, reports, the results of a suite, and a repository to put them into."""
    rng = np.random.default_rng(0)
    for place in ("train/Fruit/Apple/A/1", "train/Fruit/Apple/B/2", "val/Vegetables/Leek/3", "test/Fruit/Kiwi/4"):
        path = Path("shop", f"{place}.jpg")
        path.parent.mkdir(parents=True)
        test_produce.photo(rng, 40, 32, 3).save(path)
    for name, results in (
        ("produce", test_produce.results()), ("cifar10", test_cifar10.results(test_cifar10.hoped_for)),
    ):  # fmt: skip
        write_json(Path(f"report_{name}", f"{name}.json"), results)
        Path(f"report_{name}", "images").mkdir()
    Path("suite").mkdir()
    write_suite(Path("suite"))
    (REPOSITORY / "docs").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", REPOSITORY)


def write_finished_experiment() -> None:
    """A folder of the tiny experiment as its stages leave it, with made-up figures, for the stage that reads them."""
    out, (first, *_) = Path("produced"), TINY.models
    for path in (*(model.checkpoint(out) for model in TINY.models), cells.tokenizer_path(out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())
    shutil.copy("classifier.pt", cells.classifier_path(out))
    guidance = {(model.name, order): 2.0 for model in TINY.models for order in TINY.orders}
    about = {
        "environment": {"device": "CPU", "python": "3.11", "packages": {"torch": "2.11"}},
        "settings": {"decode_path": "plain"}, "model": {"embed_dim": 32, "depth": 2},
    }  # fmt: skip
    for cell in (*cells.tuning_cells(TINY), *cells.table_cells(TINY, guidance, fid=False)):
        figures = {"frechet_distance": 9.0 + cell.seed - cell.cfg, "class_accuracy": 0.5, "sec_per_image": 0.1}
        record = dataclasses.asdict(cell) | cells.file_hashes(out, cell.model)
        write_json(out / "eval" / cell.name / "results.json", about | figures | {"record": record})
        Image.new("RGB", (8, 8)).save(out / "eval" / cell.name / "grid.png")
    known = test_produce.results()
    write_json(out / "tokenizer" / "metrics.json", known["tokenizer"])
    write_json(out / "floors" / "reference_real.json", known["floors"]["reference_real"])
    for name in TINY.trainings:
        lines = (json.dumps(line) for line in known["trainings"][name]["loss_curve"])
        (out / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        trained = {"epoch": 2, "args": {"epochs": 2}, "config": known["trainings"][name]["model"]}
        write_json((out / name / LAST).with_suffix(".json"), trained)
    hashes = cells.file_hashes(out, first)
    write_json(out / "neighbours" / f"{first.name}.json", known["neighbours"]["lpd_random"] | hashes)
    source = {"pretrained_ckpt": {"sha256": hashes["checkpoint_sha256"]}}
    of_cells = {"cells": known["likelihood"]["lpd_random"], "source": source}
    write_json(out / "likelihood" / first.name / "likelihood.json", of_cells)
    write_json(out / "contexts.json", known["contexts"])
