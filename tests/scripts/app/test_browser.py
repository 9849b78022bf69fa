"""The page in a real browser: each tab, mistakes, two windows at once, and what stays behind.

pip install gradio playwright; apt-get install chromium; python -m pytest -m browser
"""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.image_generator import ImageGenerator
from scripts.app.handlers import png_of, shown
from scripts.app.server import ServerConfig
from tests.helpers.browser import chromium
from tests.helpers.commands import ROOT
from tests.helpers.tiny_generator import write_model

pytestmark = [pytest.mark.browser, pytest.mark.slow]
STEPS, CFG = 16, 4.0  # what the page proposes


@dataclass(frozen=True)
class Served:
    """A running page, and the folders that its process has for itself."""

    url: str
    port: int
    process: subprocess.Popen[str]
    model: tuple[Path, Path]
    working: Path
    temporary: Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    model = write_model(folder, img_size=16)
    working, temporary = folder / "working", folder / "temporary"
    working.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "scripts.app", "--port", str(port), "--device", "cpu"]
    command += ["--pretrained_ckpt", str(model[0]), "--vqgan_path", str(model[1])]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=working, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = f"http://127.0.0.1:{port}"
        assert process.stdout.readline() == f"{url} shows the page; Ctrl-C stops it.\n", process.stderr.read()
        yield Served(url, port, process, model, working, temporary)
        process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def page(served: Served, browser: Any) -> Iterator[Any]:
    """A new window on the page; no request went anywhere else, and no script failed."""
    page = browser.new_page()
    requested: list[str] = []
    failed: list[Exception] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: failed.append(error))
    open_page(page, served)
    yield page
    page.close()
    assert not [url for url in requested if not url.startswith((served.url, "data:", "blob:"))]
    assert not failed


def open_page(page: Any, served: Served) -> None:
    page.goto(served.url)
    page.wait_for_selector("#generate")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def fill(page: Any, label: str, value: object) -> None:
    field = page.get_by_label(label).locator("visible=true").first
    field.fill(str(value))
    field.press("Tab")


def upload(page: Any, name: str, content: bytes) -> None:
    field = page.locator("#upload").locator("..").locator("input[type=file]").first
    field.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})


def generate(page: Any) -> None:
    """Click, and wait for the line that says it is done."""
    page.click("#generate")
    page.wait_for_selector("#generated >> text=tokens in")


def downloaded(page: Any) -> list[bytes]:
    """The pictures, as PNG, of the archive that the page offers."""
    with page.expect_download() as download:
        page.click("#download")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist()[-1] == "settings.json"
        return [archive.read(name) for name in archive.namelist()[:-1]]


def in_gallery(page: Any, gallery: str) -> list[Image.Image]:
    """The pictures that a gallery shows, as they are sent."""
    page.wait_for_selector(f"{gallery} .grid-container img")
    urls = page.locator(f"{gallery} .grid-container img").evaluate_all("images => images.map(image => image.src)")
    return [Image.open(io.BytesIO(page.request.get(url).body())).convert("RGB") for url in urls]


def wait_for_message(page: Any, sentence: str) -> None:
    """A message with this sentence comes up; it is closed."""
    page.locator(".toast-body", has_text=sentence).locator(".toast-close").first.click()


def expected(served: Served, seed: int) -> list[bytes]:
    made = ImageGenerator(*served.model, device="cpu")(["ash"] * 4, STEPS, seed=seed, cfg=CFG)
    return [png_of(picture) for picture in made]


def test_generate(page: Any, served: Served) -> None:
    """The pictures are those of Python with the same settings."""
    fill(page, "Seed", 5)
    generate(page)
    assert downloaded(page) == expected(served, 5)
    sizes = {picture.size for picture in in_gallery(page, "#pictures")}
    assert sizes == {shown(Image.new("RGB", (16, 16))).size}


def test_mistakes_are_messages_and_the_page_goes_on(page: Any, served: Served) -> None:
    fill(page, "Seed", -1)
    page.click("#generate")
    wait_for_message(page, "seed -1 must lie between 0 and")
    tab(page, "Edit")
    page.click("#take")
    wait_for_message(page, "no generated picture yet")
    page.click("#edit")
    wait_for_message(page, "no picture to edit yet")
    for name, content, sentence in (
        ("broken.png", b"no picture", "broken.png is not a readable picture"),
        ("small.png", png_of(Image.new("RGB", (15, 15))), "15×15 pixels, fewer than the model's 16×16"),
        ("large.png", bytes(17 << 20), "large.png"),
    ):
        upload(page, name, content)
        wait_for_message(page, sentence)
    upload(page, "good.png", png_of(Image.new("RGB", (40, 30))))
    page.wait_for_timeout(3000)
    page.click("#edit")
    wait_for_message(page, "nothing is painted")
    tab(page, "Generate")
    fill(page, "Seed", 6)
    generate(page)
    assert downloaded(page) == expected(served, 6)


def test_a_second_click_does_not_break_the_first(page: Any, served: Served) -> None:
    fill(page, "Seed", 7)
    for _ in range(4):
        page.click("#generate", no_wait_after=True)
    page.wait_for_selector("#generated >> text=tokens in")
    assert downloaded(page) == expected(served, 7)


def test_two_windows_at_once(page: Any, served: Served, browser: Any) -> None:
    """Each gets its own pictures."""
    other = browser.new_page()
    open_page(other, served)
    for window, seed in ((page, 8), (other, 9)):
        fill(window, "Seed", seed)
    for window in (page, other):
        window.click("#generate", no_wait_after=True)
    for window, seed in ((other, 9), (page, 8)):
        window.wait_for_selector("#generated >> text=tokens in")
        assert downloaded(window) == expected(served, seed)
    other.close()


def test_watch_steps_and_plays(page: Any) -> None:
    tab(page, "Watch")
    page.click("#watch")
    page.wait_for_selector("#frame1 img")
    assert "s for 16 tokens in 16 steps, order lpd" in page.inner_text("#time0")
    assert "order raster" in page.inner_text("#time1")
    last = page.get_attribute("#frame0 img", "src")
    fill(page, "number input for Step", 3)
    page.wait_for_function("last => document.querySelector('#frame0 img').src != last", arg=last)
    raster = Image.open(io.BytesIO(page.request.get(page.get_attribute("#frame1 img", "src")).body())).convert("RGB")
    green = (np.asarray(raster) == (27, 158, 119)).all(axis=2)
    assert green[8:56].any()  # the first row of cells, of which the third is chosen
    assert not green[60:].any()
    page.click("#play")
    page.wait_for_selector("#play >> text=Stop")
    page.wait_for_selector("#play >> text=Play")
    assert page.get_by_label("number input for Step").input_value() == "16"


def test_paint_and_edit(page: Any) -> None:
    """A generated picture: what is painted changes, everything else stays as it was."""
    generate(page)
    before = in_gallery(page, "#pictures")[1]
    page.locator("#pictures .grid-container button").nth(1).click()
    tab(page, "Edit")
    page.wait_for_selector("#editor canvas")
    page.click("#take")
    page.wait_for_timeout(3000)  # the editor draws on a canvas, which says nothing of it
    page.click("#edit")
    wait_for_message(page, "nothing is painted")
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    for i in range(12):
        page.mouse.move(x - 60 + 10 * i, y - 60)
        page.wait_for_timeout(20)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.click("#edit")
    page.wait_for_selector("#edited_line >> text=tokens generated anew")
    first, marked, *variants = map(np.asarray, in_gallery(page, "#edited"))
    assert np.array_equal(first, np.asarray(before))
    assert len(variants) == 4
    painted = (marked != first).any(axis=2)
    assert 0.05 < painted.mean() < 0.8
    for variant in variants:
        assert not (variant != first).any(axis=2)[~painted].any()
    assert len({variant.tobytes() for variant in (first, *variants)}) > 2


def test_orders_are_drawn_at_once(page: Any) -> None:
    tab(page, "Orders")
    page.wait_for_selector("#order img")
    before = page.get_attribute("#order img", "src")
    fill(page, "number input for Tokens per side", 12)
    page.wait_for_function("before => document.querySelector('#order img').src != before", arg=before)
    assert re.search(r"lpd\s+random", page.inner_text("#statistics"))


def test_a_port_that_is_taken_is_one_sentence(served: Served) -> None:
    command = [sys.executable, "-m", "scripts.app", "--pretrained_ckpt", "nowhere", "--port", str(served.port)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: port {served.port} of 127.0.0.1 cannot be used")
    assert result.stderr.count("\n") == 1


def test_nothing_stays_behind(served: Served) -> None:
    """The last of the module: it stops the server."""
    assert any(served.temporary.iterdir())  # what the other tests made
    served.process.send_signal(signal.SIGTERM)
    _, errors = served.process.communicate(timeout=30)
    assert (served.process.returncode, errors) == (0, "")
    assert not any(served.temporary.iterdir())
    assert not any(served.working.iterdir())
    ServerConfig(port=served.port).require_free()
