"""Publishing what the suite for a GPU measured: tables of the README, copies of the results, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.produce.report import REPORT as PRODUCE
from scripts import gpu_tables
from scripts.gpu_suite import Suite, SuiteConfig
from tests.helpers.commands import ROOT
from tests.helpers.experiment_results import produce_results
from tests.helpers.gpu_results import GPU, REVISION, write_suite
from util.errors import UserError
from util.files import write_json


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A root with the project's README as it stands."""
    root = tmp_path / "repository"
    root.mkdir()
    shutil.copy(ROOT / "README.md", root)
    return root


def between(text: str, mark: str) -> str:
    return text.partition(f"<!-- gpu:{mark} -->\n")[2].partition(f"\n<!-- /gpu:{mark} -->")[0]


def test_publishing_fills_the_readme_and_does_so_again(tmp_path: Path, repository: Path) -> None:
    """Guards against marks lost from the README, and figures in the wrong column."""
    write_suite(tmp_path)
    gpu_tables.publish(tmp_path, "test", repository)
    text = (repository / "README.md").read_text()
    assert "run on a GPU yet" not in text
    measured = "latency, products of a step, orders, training, evaluation ([speed on a GPU](#speed-on-a-gpu))."
    tested = "GPU tests: 16 passed, 1 failed, 0 skipped."
    assert between(text, "status") == f"**Measured on one a GPU**: {measured} {tested}"
    paths = between(text, "paths").replace("\n", " ")
    assert "| `plain` | 100.0 ms | 100.0 ms | 1.0 | – | 3.2 GiB |" in paths
    assert "| `graph` | 12.5 ms | 20.0 ms | 5.0 | 2,345 | 3.2 GiB |" in paths
    assert "a GPU, driver 570.1, torch 2.11.0, triton 3.6.0, code of revision 0123456789, 2026-01-02, random" in paths
    assert "random weights, medians (batch 1: 50 runs after 20)" in paths
    assert "`python -m scripts.gpu_suite --output_dir DIR --quick`" in paths
    assert "[kernels of `graph`](benchmarks/results/kernels_test.txt)" in paths
    row = "| LPD-L, 256 px, 20 steps | 20.0 ms | 280 ms | 25% | – | 320.0 | 139.1 | – | 3.2 GiB |"
    assert row in between(text, "rows")
    tiles = between(text, "tiles")
    assert "| fc1, 12 rows | 5.0 | 4.1 | 3.5 (64×128, 1, 5) | 4.5 | 2.5 |" in tiles
    assert "| fc1, 78 rows | 5.0 | – | – | – | – |" in tiles
    train = between(text, "train")
    assert "| plain | out of memory | – | – | 70.0 GiB |" in train
    assert "| fast | 512 | 40% | 125 ms | 20.0 GiB |" in train
    assert "| torch, a GPU | 1,234,567/s | 1,234,567/s |" in between(text, "orders")
    evaluation = between(text, "evaluation")
    assert "| with features (classifier-net, random weights), images/s | 300.0 |" in evaluation
    assert "(extrapolated) | 25% |" in evaluation
    for mark in ("paths", "rows", "tiles", "train", "orders", "evaluation"):
        table = [line for line in between(text, mark).splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1
        assert set(table[1]) == {"|", "-"}
    results = {path.name for path in (repository / "benchmarks" / "results").iterdir()}
    groups = ("tests", "latency", "tiles", "orders", "train", "evaluation")
    assert results == {*(f"{group}_test.json" for group in groups), "kernels_test.txt"}
    latency = (repository / "benchmarks" / "results" / "latency_test.json").read_text()
    assert str(tmp_path) not in latency
    assert json.loads(latency)["parts"]["latency_by_path"]["result"]["results"][2]["graph_nodes"] == 2345

    gpu_tables.publish(tmp_path, "test", repository)
    assert (repository / "README.md").read_text() == text
    summary = json.loads((tmp_path / "summary.json").read_text())
    for part in ("latency_by_path", "latency_lpd_l_res256_steps20", "orders"):
        summary["parts"][part]["state"] = "failed"
    summary["parts"]["train"]["date"] = "2026-02-03"
    write_json(tmp_path / "summary.json", summary)
    gpu_tables.publish(tmp_path, "test", repository)
    again = (repository / "README.md").read_text()
    for mark in ("status", "paths", "rows", "orders"):
        assert between(again, mark) == between(text, mark)
    assert "2026-02-03" in between(again, "train")


@pytest.mark.parametrize(
    ("kept", "first"),
    [
        ({"tests"}, "**Nothing has been measured on a GPU yet**; tests have been run on one a GPU. GPU tests: 16"),
        ({"tests", "orders"}, "**Latency has not been measured on a GPU yet**; on one a GPU: orders. GPU tests: 16"),
        ({"orders", "train"}, "**Latency has not been measured on a GPU yet**; on one a GPU: orders, training."),
    ],
)
def test_without_latency_the_readme_does_not_say_measured(
    tmp_path: Path, repository: Path, kept: set[str], first: str
) -> None:
    write_suite(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["parts"] = {name: part for name, part in summary["parts"].items() if name in kept}
    write_json(tmp_path / "summary.json", summary)
    gpu_tables.publish(tmp_path, "test", repository)
    assert between((repository / "README.md").read_text(), "status").startswith(first)


def test_figures_of_two_revisions_are_published_as_such(tmp_path: Path, repository: Path) -> None:
    write_suite(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["parts"]["latency_by_path"]["revision"] = None
    summary["parts"]["latency_lpd_l_res256_steps20"]["revision"] = f"{REVISION}-dirty"
    summary["parts"]["latency_lpd_l_res256_steps32"] = summary["parts"]["latency_lpd_l_res256_steps20"] | {
        "revision": REVISION
    }
    write_json(tmp_path / "summary.json", summary)
    gpu_tables.publish(tmp_path, "test", repository)
    text = (repository / "README.md").read_text().replace("\n", " ")
    assert "code of revision unknown, 2026-01-02" in text
    assert "code of revision 0123456789 and 0123456789-dirty, 2026-01-02" in text


def test_what_means_nothing_is_not_published(tmp_path: Path, repository: Path) -> None:
    before = (repository / "README.md").read_text()
    with pytest.raises(UserError, match=r"has no summary\.json"):
        gpu_tables.publish(tmp_path, "test", repository)
    write_suite(tmp_path, device="CPU")
    with pytest.raises(UserError, match="of a CPU"):
        gpu_tables.publish(tmp_path, "test", repository)
    summary = json.loads((tmp_path / "summary.json").read_text()) | {"device": "a GPU"}
    summary["parts"]["orders"]["tiny"] = True
    write_json(tmp_path / "summary.json", summary)
    with pytest.raises(UserError, match="tiny models"):
        gpu_tables.publish(tmp_path, "test", repository)
    write_json(tmp_path / "summary.json", summary | {"parts": {}})
    with pytest.raises(UserError, match="nothing to publish"):
        gpu_tables.publish(tmp_path, "test", repository)
    assert (repository / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("summary.json", {"parts": [1]}), ("summary.json", {"device": None}), ("train.json", {"rows": 3}),
        ("latency_by_path.json", {"results": [{}]}), ("summary.json", None), ("train.json", None),
        ("latency_lpd_l_res256_steps20.json", {"results": [{}]}), ("orders.json", {"drawing": [{}]}),
    ],
)  # fmt: skip
def test_damaged_results_are_named_and_nothing_is_published(
    tmp_path: Path, repository: Path, name: str, change: dict[str, Any] | None
) -> None:
    """Guards against results that are half published, and a suite that resumes from a damaged summary."""
    write_suite(tmp_path)
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    content = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text("{" if change is None else json.dumps(content | change))
    with pytest.raises(UserError, match=rf"(summary|result) \S*/{name} is truncated or damaged"):
        gpu_tables.publish(tmp_path, "test", repository)
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    if name == "summary.json" and "device" not in (change or {}):
        with pytest.raises(UserError, match=r"summary\.json is truncated or damaged"):
            Suite([], tmp_path, SuiteConfig(output_dir=tmp_path), GPU)


def test_damaged_results_of_an_earlier_publication_are_named(tmp_path: Path, repository: Path) -> None:
    write_suite(tmp_path)
    earlier = repository / "benchmarks" / "results" / "tests_test.json"
    summary = json.loads((tmp_path / "summary.json").read_text())
    del summary["parts"]["tests"]
    write_json(tmp_path / "summary.json", summary)
    write_json(earlier, {"parts": {}})
    with pytest.raises(UserError, match=r"published results .*tests_test\.json is truncated or damaged"):
        gpu_tables.publish(tmp_path, "test", repository)
    assert list(earlier.parent.iterdir()) == [earlier]


def test_reports_of_experiments_are_published_with_the_suite_or_nothing_is(tmp_path: Path, repository: Path) -> None:
    """Guards against half a publication, and files outside the repository."""
    write_suite(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["parts"]["produce"] = summary["parts"]["orders"] | {"group": "photos", "result": "produce/report"}
    write_json(tmp_path / "summary.json", summary)
    folder, results = PRODUCE.folder(tmp_path / "produce"), produce_results()
    unnamed = {name: value for name, value in results.items() if name != "experiment"}
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    for content, named in (
        (None, r"has no produce\.json"),
        (unnamed, r"produce\.json is truncated or damaged"),
        (results | {"experiment": "../../../escaped"}, r"produce\.json is of another experiment"),
        (results, r"has no page produce\.md"),
    ):
        if content is not None:
            write_json(folder / "produce.json", content)
        with pytest.raises(UserError, match=named):
            gpu_tables.publish(tmp_path, "test", repository)
        assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    PRODUCE.draw(folder)
    gpu_tables.publish(tmp_path, "test", repository)
    assert (repository / "docs" / "produce.md").read_text() == (folder / "produce.md").read_text()
    assert json.loads((repository / "benchmarks" / "results" / "produce_test.json").read_text()) == results


def test_the_readme_says_what_was_measured() -> None:
    """All marks are there once; a table without a published result says that there is none."""
    text = (ROOT / "README.md").read_text()
    for mark in ("status", "paths", "rows", "tiles", "train", "orders", "evaluation"):
        assert gpu_tables.fill(text, mark, between(text, mark)) == text
        assert re.search(r"yet\*\*|yet\.\*\*|has been tried|Measured on|\|---\|", between(text, mark))
    for broken in (text.replace("<!-- gpu:rows -->", ""), text + "<!-- gpu:rows -->", text + "<!-- /gpu:rows -->"):
        with pytest.raises(UserError, match="gpu:rows"):
            gpu_tables.fill(broken, "rows", "")
