"""The search: what it proposes is valid, what it prefers is likelier, and it keeps to its budget."""

from __future__ import annotations

import functools
import io
import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from engine.likelihood import search as search_module
from engine.likelihood.measure import Meter, Settings
from engine.likelihood.search import OutOfTime, Samples, Search, cheapest_sizes, cost_table, race, shaped_sizes
from orders.config import OrderConfig
from orders.draw import OrderSpec
from tests.helpers.likelihood_case import GRID, source
from tests.helpers.processes import ALONE, in_processes
from tests.helpers.tiny_run import L
from util.dist import Dist


class Made(Samples):
    """Samples whose bits are made up: `cost` of the schedule, noise that is the same for all, and some that isn't."""

    def __init__(self, cost, noise: float = 0.0, calls: int = 10**9) -> None:  # type: ignore[no-untyped-def]
        self.cost, self.noise, self.calls, self.images = cost, noise, calls, np.arange(8)

    def bits(self, spec: OrderSpec, count: int) -> np.ndarray:
        self.calls -= 1
        if self.calls < 0:
            raise OutOfTime
        rng = np.random.default_rng(abs(hash(spec)) % 2**32)
        return self.cost(spec) + np.sin(np.arange(count)) + self.noise * rng.standard_normal(count)

    def step_bits(self, spec: OrderSpec, count: int) -> np.ndarray:
        return self.cost_of_steps(spec)

    @staticmethod
    def cost_of_steps(spec: OrderSpec) -> np.ndarray:
        """A group of g where a tokens are known costs 3·g − a/L·g + g²/(4 + a)."""
        sizes = np.array(spec.group_sizes)
        known = np.cumsum(sizes) - sizes
        return sizes * (3 - known / L + sizes / (4 + known))


def total(spec: OrderSpec) -> float:
    return float(Made.cost_of_steps(spec).sum()) / L


def spec(*sizes: int, order: str = "lpd", tau: float = 1.0, rho: int = 1) -> OrderSpec:
    return OrderSpec(order, (GRID, GRID), sizes, tau, rho, 0)


def run(samples: Samples, start: OrderSpec, seed: int = 0) -> OrderSpec:
    return Search(samples, start, seed).run()


def test_race_prefers_what_is_likelier() -> None:
    cost = {spec(1, size, 15 - size): abs(size - 6) / 100 for size in range(1, 15)}
    made = Made(cost.__getitem__, noise=0.02)
    assert race(made, spec(1, 1, 14), list(cost)) == spec(1, 6, 9)
    assert race(made, spec(1, 6, 9), list(cost)) == spec(1, 6, 9)


def test_race_does_not_take_noise_for_a_gain() -> None:
    """Of challengers that are no better, few may win by luck: one in six, for a gain of one standard error."""
    made = Made(lambda _: 0.0, noise=0.1)
    wins = sum(race(made, spec(1, 15), [spec(1, 15, tau=tau)]) != spec(1, 15) for tau in np.arange(2, 62).tolist())
    assert wins < 20


def test_search_finds_the_least_cost() -> None:
    """Of all group sizes of four steps, under costs that say nothing about thresholds."""
    start = spec(1, 3, 5, 7)
    compositions = ((1, a, b, 15 - a - b) for a in range(1, 14) for b in range(1, 15 - a))
    least = min(total(spec(*sizes)) for sizes in compositions)
    found = run(Made(total), start)
    assert total(found) == pytest.approx(least)
    assert total(found) < total(start)


def test_search_finds_thresholds_that_change_along_the_steps() -> None:
    def cost(schedule: OrderSpec) -> float:
        early, *_, late = schedule.of_steps(schedule.proximity_threshold, "proximity")[1:]
        far = sum(schedule.of_steps(schedule.repulsion_threshold, "repulsion"))
        return total(schedule) + (early is not None) + (late != 2.0) + far / 100

    found = run(Made(cost), spec(1, 3, 5, 7))
    proximity = found.of_steps(found.proximity_threshold, "proximity")
    assert (proximity[1], proximity[-1]) == (None, 2.0)
    assert set(found.of_steps(found.repulsion_threshold, "repulsion")[1:]) == {0}


@pytest.mark.parametrize("order", ["random", "halton"])
def test_other_kinds_have_group_sizes_only(order: str) -> None:
    found = run(Made(total), spec(4, 4, 8, order=order, rho=2))
    assert (found.kind, found.proximity_threshold, found.repulsion_threshold) == (order, 1.0, 2)
    assert total(found) < total(spec(4, 4, 8, order=order))


@pytest.mark.parametrize("steps", [1, 2, L])
def test_schedules_without_freedom(steps: int) -> None:
    """All tokens at once, first one and then the rest, and one by one: nothing to move, and no end to wait for."""
    sizes = OrderConfig(order="random", generation_steps=steps).for_grid(GRID, 0).group_sizes
    assert len(run(Made(total), spec(*sizes, order="random")).group_sizes) == steps


def test_all_that_is_proposed_is_valid() -> None:
    """A spec checks itself; seeds of random changes on top of each other."""
    start = spec(1, 1, 2, 3, 9)
    for seed in range(30):
        search = Search(Made(total), start, seed)
        for _ in range(20):
            search.best = search._changes()[seed % 15]
            assert len(search.best.group_sizes) == 5
    assert search.best != start


@pytest.mark.parametrize("shape", search_module.SHAPES)
def test_shapes(shape: float) -> None:
    for tokens, steps in ((64, 8), (64, 64), (256, 20), (5, 4), (7, 1)):
        sizes = shaped_sizes(tokens, steps, shape)
        assert (len(sizes), sum(sizes), min(sizes) >= 1) == (steps, tokens, True)
        assert sizes[0] == (1 if steps > 1 else tokens)
    assert sum(shaped_sizes(64, 8, shape)[:4]) == pytest.approx(64 * 0.5**shape, abs=4)


@pytest.mark.parametrize("first_is_one", [True, False])
def test_dynamic_programming_finds_the_cheapest_of_all(first_is_one: bool) -> None:
    rng = np.random.default_rng(3)
    cost = rng.random((9, 10))
    cost[np.add.outer(np.arange(9), np.arange(10)) > 9] = np.inf
    for steps in (2, 3, 5, 9):
        cuts = (c for c in itertools.combinations(range(1, 9), steps - 1) if not first_is_one or c[0] == 1)

        def price(sizes: tuple[int, ...]) -> float:
            return sum(cost[sum(sizes[:step]), size] for step, size in enumerate(sizes))

        least = min(price(tuple(np.diff((0, *cut, 9)).tolist())) for cut in cuts)
        found = cheapest_sizes(cost, steps, first_is_one)
        assert (sum(found), len(found)) == (9, steps)
        assert price(found) == pytest.approx(least)


def test_costs_between_the_tabulated_ones() -> None:
    curves = {1: (np.array([0, 4]), np.array([3.0, 1.0])), 4: (np.array([0, 4]), np.array([5.0, 3.0]))}
    cost = cost_table(8, curves)
    assert cost[0, 1] == 3
    assert cost[2, 4] == 4 * 4
    assert cost[2, 2] == pytest.approx(2 * 3)  # half way between 1 and 4 on a logarithmic scale
    assert cost[6, 2] == pytest.approx(2 * 2)
    assert np.isinf(cost[6, 3])


def test_samples_are_images_in_further_and_further_orders(tmp_path: Path) -> None:
    """Sample j is image j mod N in order j; asked for more, only what is new is computed, in any batches."""
    held, chosen = source(tmp_path / "codes"), np.array([2, 7, 11])
    meter = Meter(held, Settings(batch_size=4))
    samples = Samples(meter, chosen, ALONE, time.monotonic() + 600)
    schedule = spec(1, 3, 5, 7, order="random")
    first, more = samples.bits(schedule, 5), samples.bits(schedule, 9)
    assert samples.passes == 9
    assert (more[:5] == first).all()
    alone = Samples(Meter(held, Settings(batch_size=1)), chosen, ALONE, time.monotonic() + 600)
    np.testing.assert_allclose(alone.bits(schedule, 9), more, rtol=1e-12)
    assert len(set(more.tolist())) == 9
    np.testing.assert_allclose(alone.step_bits(schedule, 9).sum() / L, more.mean())


def compare_bits(expected: list[float], folder: Path, dist: Dist) -> None:
    samples = Samples(Meter(source(folder / "codes"), Settings(batch_size=2)), np.array([2, 7, 11]), dist, math.inf)
    np.testing.assert_allclose(samples.bits(spec(1, 3, 5, 7), 9), expected, rtol=1e-12)
    assert samples.passes == 9


@pytest.mark.slow
def test_processes_share_the_samples(tmp_path: Path) -> None:
    """Each gets all of them, so that all decide alike; the last turn has no sample for the second."""
    alone = Samples(Meter(source(tmp_path / "codes"), Settings()), np.array([2, 7, 11]), ALONE, math.inf)
    expected = alone.bits(spec(1, 3, 5, 7), 9).tolist()
    in_processes(2, functools.partial(compare_bits, expected, tmp_path))


def test_the_bar_moves_with_each_batch(tmp_path: Path) -> None:
    with tqdm(total=600, file=io.StringIO()) as progress:
        meter = Meter(source(tmp_path / "codes"), Settings(batch_size=2))
        samples = Samples(meter, np.arange(8), ALONE, math.inf, progress)
        samples.begun -= 60
        samples.bits(spec(1, 15), 4)
        assert 60 <= progress.n < 120


def test_the_budget_ends_the_search(tmp_path: Path) -> None:
    samples = Samples(Meter(source(tmp_path / "codes"), Settings()), np.arange(8), ALONE, time.monotonic())
    with pytest.raises(OutOfTime):
        samples.bits(spec(1, 15), 4)
    start = spec(1, 3, 5, 7)
    assert run(samples, start) == start
    assert run(Made(total, calls=200), start) != start, "what was found before the end is kept"
