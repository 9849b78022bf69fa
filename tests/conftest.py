"""What holds for all tests: one thread, a fixed seed, and none without the GPU or the browser that it needs."""

from __future__ import annotations

import os
import random

# Read when torch is imported, and inherited by the processes that tests start. The models of the tests are tiny: more
# threads than free cores make them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest
import torch

from tests.helpers.browser import missing


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {"gpu": "" if torch.cuda.is_available() else "needs a CUDA GPU", "browser": missing()}
    for item in items:
        for mark, reason in lacking.items():
            if reason and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
