"""A measurement counts every image once, whatever the batch, the processes or an interruption."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.evaluation import partial_results
from engine.likelihood import measure as measure_module
from engine.likelihood.measure import Measured, Settings, measure
from engine.likelihood.passes import token_bits
from tests.helpers.likelihood_case import N, decodings, source
from tests.helpers.processes import ALONE, in_processes
from util.dist import Dist
from util.errors import UserError


def run(folder: Path, batch_size: int = 6, dist: Dist = ALONE, seed: int = 0) -> Measured:
    return measure(source(folder / "codes"), decodings(seed), Settings(2, batch_size=batch_size), folder / "out", dist)


def assert_same(found: Measured, expected: Measured) -> None:
    np.testing.assert_allclose(found.image_bits, expected.image_bits, rtol=1e-12)
    np.testing.assert_allclose(found.positions, expected.positions, rtol=1e-12)
    for mine, theirs in zip(found.steps, expected.steps, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


def test_figures_are_those_of_single_passes(tmp_path: Path) -> None:
    """Each image by itself, in its own orders: i·K and i·K + 1 where they vary, the one there is where not."""
    found, held = run(tmp_path), source(tmp_path / "codes")
    for number, decoding in enumerate(decodings()):
        steps = []
        for image in range(N):
            tokens, labels = held.images.codes([image])
            numbers = [2 * image, 2 * image + 1] if decoding.varies else [0]
            orders = torch.from_numpy(decoding.orders.of_images(numbers).astype(np.int64))
            bits = torch.cat(
                [
                    token_bits(
                        held.model, tokens, labels if decoding.with_class else None, o[None], decoding.group_sizes
                    )
                    for o in orders
                ]
            ).mean(0)
            assert found.image_bits[image, number] == pytest.approx(float(bits.sum()), rel=1e-12)
            steps.append([float(part.sum()) for part in bits.split(list(decoding.group_sizes))])
        np.testing.assert_allclose(found.steps[number], [np.sum(steps, 0), np.square(steps).sum(0)])
    np.testing.assert_allclose(found.positions.sum(1), found.image_bits.sum(0))
    assert found.passes == N * (2 + 2 + 1 + 2)


def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    assert_same(run(tmp_path, 5), run(tmp_path, 23))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stopped_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    """With another batch size; what is there is not measured again, and of other settings nothing is taken over. A part
    that is damaged is measured again."""
    whole = run(tmp_path)
    monkeypatch.setattr(partial_results, "SAVE_INTERVAL_S", 0)
    original, calls = measure_module.Meter.__call__, iter(range(10))

    def stop(*arguments: object) -> object:
        if next(calls, None) is None:
            raise RuntimeError("stopped")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(measure_module.Meter, "__call__", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path)
    monkeypatch.setattr(measure_module.Meter, "__call__", original)
    parts = sorted((tmp_path / "out").glob("partial-*/part_*"))
    assert len(parts) == 2
    assert run(tmp_path, seed=1).passes == N * 7, "of another seed"
    if damaged:
        parts[1].write_bytes(parts[1].read_bytes()[:-100])
    resumed = run(tmp_path, 4)
    assert resumed.passes == (N - (6 if damaged else 12)) * 7
    assert_same(resumed, whole)
    assert list((tmp_path / "out").iterdir()) == []


def compare_with(expected: Path, folder: Path, dist: Dist) -> None:
    found = run(folder, 12, dist)
    with np.load(expected) as file:
        np.testing.assert_allclose(found.image_bits, file["image_bits"], rtol=1e-12)
        np.testing.assert_allclose(found.positions, file["positions"], rtol=1e-12)


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    """More than there are batches for."""
    whole = run(tmp_path)
    np.savez(tmp_path / "whole.npz", image_bits=whole.image_bits, positions=whole.positions)
    in_processes(3, functools.partial(compare_with, tmp_path / "whole.npz", tmp_path))


def test_a_lost_part_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_results.PartialResults, "save", lambda partial: None)
    with pytest.raises(UserError, match="does not hold each of the 23 images once"):
        run(tmp_path)
