"""Where torch-fidelity, submitit and tensorboard are not installed, only what needs them is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from engine.evaluation import outputs
from engine.evaluation.outputs import describe_environment
from tests.helpers.commands import ROOT
from tests.helpers.processes import ALONE

WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("torch_fidelity", "submitit", "tensorboard"))
"""


def python_without_them(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_gpu_tests_are_collected() -> None:
    """Guards against a test module that cannot be imported, which stops all GPU tests."""
    arguments = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    printed = python_without_them(f"import pytest; sys.exit(pytest.main({arguments}))")
    assert "test_gpu_paths_give_the_codes_of_the_cpu[graph_library]" in printed


@pytest.mark.slow
def test_scores_in_a_classifiers_features() -> None:
    code = "import torch; from engine.scoring.metrics import inception_score; print(inception_score(torch.eye(20)))"
    assert python_without_them(code).startswith("(1.")


def test_a_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "RECORDED_PACKAGES", ("torch", "no-such-package"))
    packages = describe_environment(ALONE)["packages"]
    assert packages == {"torch": torch.__version__.split("+")[0], "no-such-package": None}
