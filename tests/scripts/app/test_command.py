"""The command of the page: what is wrong is one sentence, before a model is loaded. The page: test_browser.py."""

from __future__ import annotations

import importlib.util
import socket
from typing import Any

import pytest

from scripts.app.__main__ import main
from tests.helpers.commands import run


@pytest.fixture
def with_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package seems to be there; nothing that these tests do uses it."""
    find = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        return importlib.util.spec_from_loader(name, loader=None) if name == "gradio" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def sentence(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(main, *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def test_without_gradio_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "needs the package gradio; install it with: pip install" in sentence(capsys)


@pytest.mark.usefixtures("with_gradio")
def test_places_that_cannot_be_listened_on(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        printed = sentence(capsys, "--port", port, "--pretrained_ckpt", "nowhere")
    assert printed.startswith(f"error: port {port} of 127.0.0.1 cannot be used (Address already in use)")
    assert "port 7860 of no.such.host.invalid cannot be used" in sentence(capsys, "--host", "no.such.host.invalid")
    assert "--port is 70000; it must be" in sentence(capsys, "--port", 70000)


@pytest.mark.usefixtures("with_gradio")
def test_without_a_model_it_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.image_generator.SHIPPED", tmp_path / "none")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    printed = sentence(capsys, "--port", port)
    assert "bash scripts/demo.sh trains the demo's" in printed
    assert "--pretrained_ckpt" in printed
