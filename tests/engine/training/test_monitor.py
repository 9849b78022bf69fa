"""The figures of a run: what they count, and that no tracker or full disk stops the training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine.training.monitor
from engine.training.monitor import Monitor, peak_flops
from tests.helpers.processes import ALONE


class Clock:
    """In place of time.perf_counter: stands still unless told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine.training.monitor.time, "perf_counter", clock)
    return clock


def monitor(folder: Path, **changes: object) -> Monitor:
    values: dict = {"start_step": 0, "total_steps": 100, "steps_per_epoch": 4, "global_batch": 32}
    values |= {"flops_per_image": 1e12, "samples_of": lambda step: [step]}
    folder.mkdir(exist_ok=True)
    return Monitor(folder, ALONE, **(values | changes))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_figures_of_a_line(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images per second count all processes' images and no evaluation; waiting is only that for the loader."""

    def batches() -> Iterator[int]:
        for index in range(4):
            clock.now += 0.5
            yield index

    monkeypatch.setattr(engine.training.monitor, "peak_flops", lambda device: 128e12)
    with monitor(tmp_path) as watch:
        for index in watch.waiting(batches()):
            clock.now += 0.5
            watch.add(torch.tensor(float(index)), torch.tensor(2.0 * index))
            if index == 1:
                watch.report(lr=0.1)
                with watch.paused():
                    clock.now += 1000
        watch.report(lr=0.2)
    first, second = lines(tmp_path)
    assert first == {
        "step": 2, "epoch": 0.5, "loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "images_per_sec": 32.0, "sec_per_step": 1.0,
        "data_wait_share": 0.5, "bf16_peak_share": 0.25,
    }  # fmt: skip
    assert second == first | {"step": 4, "epoch": 1.0, "loss": 2.5, "lr": 0.2, "grad_norm": 5.0}


def test_peaks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower PCIe and NVL cards have the H100's name too; of an unknown device nothing is claimed."""
    for name, teraflops in (
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA Titan X", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == (teraflops and teraflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None


class FullDisk:
    """A tracker that cannot write."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        raise OSError(28, "No space left on device")

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        pass


def test_figures_that_cannot_be_written_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with monitor(tmp_path, trackers=[FullDisk()]) as watch:
        watch.add(torch.tensor(1.0), torch.tensor(1.0))
        watch.report(lr=0.1)
        watch.picture("samples", Image.new("RGB", (8, 8)), epoch=3)
    assert caplog.text.count("No space left") == 2
    assert (tmp_path / "samples" / "epoch0003.png").is_file()


@pytest.mark.parametrize(("loss", "norm"), [("nan", "1"), ("inf", "1"), ("1", "inf"), ("1", "nan")])
def test_the_first_step_that_is_not_finite_is_named(tmp_path: Path, loss: str, norm: str) -> None:
    with monitor(tmp_path) as watch:
        for index in range(6):
            bad = index in (2, 4)
            watch.add(torch.tensor(float(loss if bad else 1)), torch.tensor(float(norm if bad else 1)))
        with pytest.raises(FloatingPointError, match="step 3"):
            watch.report(lr=0.1)
    assert lines(tmp_path) == []
    report = json.loads((tmp_path / "nonfinite-rank0.json").read_text())
    assert (report["step"], report["samples"]) == (3, [2])
