"""A headless Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def missing() -> str:
    """What browser tests lack here; empty where they can run."""
    lacking = [package for package in ("gradio", "playwright") if importlib.util.find_spec(package) is None]
    lacking += [] if shutil.which("chromium") else ["chromium"]
    return f"needs {' and '.join(lacking)}" if lacking else ""


@contextlib.contextmanager
def chromium(user_data: Path) -> Iterator[Any]:
    """A browser context (playwright.sync_api.BrowserContext) with a new profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            user_data, executable_path=shutil.which("chromium"), headless=True, args=_FLAGS,
            viewport={"width": 1280, "height": 900},
        )  # fmt: skip
        context.set_default_timeout(60_000)
        yield context
        context.close()
