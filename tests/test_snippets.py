"""What the documents show in Python runs: the snippet of the README and the cells of the notebook."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import build_model
from tests.helpers.commands import ROOT
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import save_tokenizer

NOTEBOOK = ROOT / "docs" / "from_checkpoint_to_pictures.ipynb"


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of the demo's sizes where the demo puts it, but quickly made."""
    torch.manual_seed(0)
    out = tmp_path / "runs" / "demo"
    save_tokenizer(tiny_tokenizer(4, 12), out / "tokenizer" / "tokenizer.pt")
    model = build_model("lpd_debug", img_size=32, stride=4, class_num=10, vocab_size=12)
    content = {"model": model.state_dict(), "config": vars(model.config), "classes": list("0123456789")}
    (out / "lpd").mkdir()
    torch.save(content, out / "lpd" / "checkpoint-last.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_snippet_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).size == (64, 64)


def test_the_cells_of_the_notebook_run(demo: Path) -> None:
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells()):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert len(list(demo.glob("runs/pictures/*.png"))) == 10
    assert all(isinstance(name, str) for name in names["generator"].classes)


def test_the_notebook_was_run_in_order_and_is_small() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert NOTEBOOK.stat().st_size < 200_000
