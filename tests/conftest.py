"""What holds for all tests: one thread, a fixed seed, no GPU tests without a GPU."""

from __future__ import annotations

import os
import random

# Read when torch is imported, and inherited by the processes that tests start. The models of the tests are tiny: more
# threads than free cores make them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
