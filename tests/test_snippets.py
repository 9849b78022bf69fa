"""What the documents show in Python runs: the snippet of the README and the cells of the notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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


def run_script(folder: Path, text: str) -> str:
    """Run a program in a folder, in a process of its own; returns what it printed."""
    (folder / "script.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "script.py"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_the_snippet_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run_script(tmp_path, snippet)
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).size == (64, 64)


def test_the_cells_of_the_notebook_run(demo: Path) -> None:
    asked = "import json\nprint(json.dumps(generator.classes))"
    printed = run_script(demo, "\n".join(["".join(cell["source"]) for cell in cells()] + [asked]))
    assert len(list(demo.glob("runs/pictures/*.png"))) == 10
    assert all(isinstance(name, str) for name in json.loads(printed.splitlines()[-1]))


def test_the_notebook_was_run_in_order_and_is_small() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert NOTEBOOK.stat().st_size < 200_000
