"""Reports of the experiments on photographs: which are published, and under which names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.produce import page
from experiments.produce.report import REPORT
from experiments.produce.scales import FINE
from tests.helpers.commands import ROOT
from tests.helpers.experiment_results import photo, produce_results
from tests.helpers.pictures import assert_not_blank
from util.errors import UserError


def test_the_published_results_still_give_their_page(tmp_path: Path) -> None:
    published = json.loads((ROOT / "benchmarks" / "results" / "produce_cpu.json").read_text())
    assert "## Contexts: what is known around a token" in page.page(published)
    page.plot(published, tmp_path)
    assert_not_blank(tmp_path / "produce_loss.png")


def test_a_report_is_published_under_the_title_of_its_scale(tmp_path: Path) -> None:
    """Guards against a page of another scale, or of another experiment, in the place of this one's."""
    folder, root = REPORT.folder(tmp_path), tmp_path / "repository"
    steps, found = FINE.tuning_steps, produce_results(FINE)
    shown = next(row for row in found["cells"] if (row["kind"], row["order"], row["steps"]) == ("table", "lpd", steps))
    grid = tmp_path / "eval" / shown["name"] / "grid.png"
    grid.parent.mkdir(parents=True)
    photo(np.random.default_rng(0), 8, 8, 1).save(grid)
    del found["experiment"]
    REPORT.write(tmp_path, FINE, found)
    text = (folder / "produce.md").read_text()
    assert f"images/produce_fine_samples_{steps}.png" in text
    REPORT.draw(folder)
    REPORT.publish(folder, "x", root)
    docs, results = root / "docs", root / "benchmarks" / "results"
    assert [path.name for path in docs.glob("*.md")] == ["produce_fine.md"]
    assert (docs / "produce_fine.md").read_text() == text
    assert [path.name for path in results.iterdir()] == ["produce_fine_x.json"]
    shown_on_page = set(re.findall(r"\(images/(\w+\.png)\)", text)) - {"produce_fine_unlabelled.png"}
    assert shown_on_page == {path.name for path in (docs / "images").iterdir()}


@pytest.mark.parametrize("title", ["../../../escaped", "produce_../x", "produce_", "produced", "cifar10", "", 3, None])
def test_a_report_of_another_title_is_refused(tmp_path: Path, title: Any) -> None:
    """Guards against names of files from anywhere, and a page of one experiment in the place of another's."""
    folder, root = REPORT.folder(tmp_path), tmp_path / "repository"
    (folder / "produce.json").write_text(json.dumps(produce_results() | {"experiment": title}))
    (folder / "produce.md").touch()
    before = sorted(tmp_path.rglob("*"))
    for refused in (lambda: REPORT.draw(folder), lambda: REPORT.publish(folder, "x", root)):
        with pytest.raises(UserError, match=r"produce\.json is of another experiment"):
            refused()
    assert sorted(tmp_path.rglob("*")) == before


def test_half_a_report_is_not_published(tmp_path: Path) -> None:
    folder = REPORT.folder(tmp_path)
    (folder / "produce.json").write_text(json.dumps(produce_results()))
    with pytest.raises(UserError, match=r"no page produce\.md"):
        REPORT.publish(folder, "x", tmp_path / "repository")
    (folder / "produce.md").touch()
    (folder / "images").rmdir()
    with pytest.raises(UserError, match="no folder images"):
        REPORT.publish(folder, "x", tmp_path / "repository")
    (folder / "images").mkdir()
    (folder / "produce.json").write_text(json.dumps(produce_results() | {"settings": {}}))
    with pytest.raises(UserError, match=r"produce\.json is truncated or damaged"):
        REPORT.publish(folder, "x", tmp_path / "repository")
    (folder / "images").rmdir()
    (folder / "produce.json").write_text(json.dumps(produce_results()))
    REPORT.draw(folder)
    assert_not_blank(folder / "images" / "produce_loss.png")
    (folder / "produce.json").unlink()
    with pytest.raises(UserError, match=r"has no produce\.json"):
        REPORT.publish(folder, "x", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
