"""Training straight from images, with processes that load them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.tiny_models import tiny_tokenizer, write_images
from tokenizers import save_tokenizer


@pytest.mark.slow
def test_a_broken_image_ends_the_training_at_once(tmp_path: Path) -> None:
    """Loading processes ignore stop signals, so an error must end them in another way, or the exit waits forever."""
    write_images(tmp_path / "images", {"a": 4, "b": 4}, 16, 16)
    (tmp_path / "images" / "a" / "broken.jpg").write_bytes(b"")
    save_tokenizer(tiny_tokenizer(), tmp_path / "tokenizer.pt")
    flags = {
        "model": "lpd_debug", "device": "cpu", "data_path": tmp_path / "images", "img_size": 16, "batch_size": 3,
        "vqgan_path": tmp_path / "tokenizer.pt", "output_dir": tmp_path / "run", "epochs": 1, "warmup_epochs": 0,
        "lr_schedule": "cosine", "num_workers": 1,
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    run = subprocess.run(
        [sys.executable, ROOT / "main_lpd.py", *words], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert run.returncode == 2
    assert "broken.jpg" in run.stderr
    assert "skip_broken" in run.stderr
    assert "Traceback" not in run.stderr
