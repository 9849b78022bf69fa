"""The commands under attack that run whole experiments, put results into the repository, or start jobs; their inputs.

The repository is the folder `repository` of the inputs, the hub a class of this file, and no job or suite is started.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from huggingface_hub.utils import validate_repo_id

import engine.hub.__main__
import engine.hub.export
import experiments.reports
import scripts.cli.run
import scripts.demo
import scripts.gpu_suite
import scripts.publish_likelihood
from experiments.cifar10.report import REPORT as CIFAR10_REPORT
from experiments.cifar10.run import EXPERIMENT as CIFAR10
from experiments.produce import data
from experiments.produce.report import REPORT as PRODUCE_REPORT
from experiments.produce.run import EXPERIMENT as PRODUCE
from tests.faults.results import Command, digest, file_digest, nothing
from tests.helpers.commands import ROOT
from tests.helpers.experiment_results import (
    cifar10_results,
    hoped_for,
    photo,
    produce_results,
    write_finished_run,
)
from tests.helpers.gpu_results import write_suite
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
        photo(rng, 40, 32, 3).save(path)
    for name, results in (
        ("produce", produce_results()), ("cifar10", cifar10_results(hoped_for)),
    ):  # fmt: skip
        write_json(Path(f"report_{name}", f"{name}.json"), results)
        Path(f"report_{name}", "images").mkdir()
    Path("suite").mkdir()
    write_suite(Path("suite"))
    (REPOSITORY / "docs").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", REPOSITORY)


def write_finished_experiment() -> None:
    """What the stage report reads."""
    write_finished_run(Path("produced"), Path("classifier.pt"))
