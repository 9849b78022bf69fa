"""Locality-aware orders against a slow version of the same rules, and against the published figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orders import draw, generate_orders, group_sizes
from orders.lpd_order import closeness, lpd_orders
from orders.order_states import TieKeys, order_states, sub_states, uniform_cells
from orders.schedule import cosine_group_sizes
from orders.statistics import order_statistics
from tests.helpers.orders_oracle import our_luck, slow_order
from util.errors import UserError

Grid = tuple[int, int]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("rho", [0, 1, 2, 3, 4])
def test_same_as_the_slow_version_with_the_same_luck(tau: float, rho: int) -> None:
    """Any slip in thresholds, borders, ranking, repulsion or the fill shows, on any grid, odd steps too."""
    for grid, steps in (((7, 7), 9), ((5, 9), 7), ((3, 4), 5), ((1, 8), 4), ((9, 2), 3), ((6, 6), 2)):
        sizes = cosine_group_sizes(grid[0] * grid[1], steps)
        fast = generate_orders("lpd", 5, sizes, grid, tau, rho, seed=rho)
        for index, order in enumerate(fast.tolist()):
            first, ties = our_luck(grid, rho, index)
            assert order == slow_order(sizes, grid, tau, rho, first, ties), (grid, index)


@pytest.mark.parametrize("img_size", [256, 512])
def test_same_as_the_slow_version_at_the_published_size(img_size: int) -> None:
    """Guards against overflow and against key bits that run out, which small grids cannot show."""
    grid, steps, rho = ((16, 16), 20, 2) if img_size == 256 else ((32, 32), 48, 4)
    sizes = group_sizes(img_size, steps)
    order = generate_orders("lpd", 1, sizes, grid, 1.0, rho, seed=5, indices=[70_000])[0]
    first, ties = our_luck(grid, 5, 70_000)
    assert order.tolist() == slow_order(sizes, grid, 1.0, rho, first, ties)


def test_thresholds_of_each_step_are_those_of_the_slow_version() -> None:
    """A mixture of thresholds, proximity left out in some steps: a window of another step's radius would show."""
    taus, rhos = (1.0, None, 0.0, 2.0, None, 1.0, 0.5), (2, 3, 0, 1, 2, 0, 4)
    for grid in ((7, 7), (5, 9), (1, 12)):
        sizes = cosine_group_sizes(grid[0] * grid[1], 7)
        fast = generate_orders("lpd", 5, sizes, grid, taus, rhos, seed=9)
        for index, order in enumerate(fast.tolist()):
            first, ties = our_luck(grid, 9, index)
            assert order == slow_order(sizes, grid, taus, rhos, first, ties), (grid, index)


def test_the_ablations_are_thresholds() -> None:
    """A searched schedule can be any of them in any step."""
    sizes = cosine_group_sizes(64, 8)
    for kind, tau, rho in (("lpd_far_only", None, 2), ("lpd_near_only", 0.0, 0), ("lpd", (1.0,) * 8, (2,) * 8)):
        same = generate_orders("lpd", 20, sizes, 8, tau, rho, seed=3)
        assert (same == generate_orders(kind, 20, sizes, 8, 1.0, 2, seed=3)).all()


def test_statistics_of_the_published_algorithm() -> None:
    """Faithful in distribution: the published figures for 256 px, 20 steps, ρ = 2, and those of random orders."""
    sizes = group_sizes(256, 20)
    means = order_statistics(generate_orders("lpd", 2000, sizes, 16, 1.0, 2, seed=1), sizes, 16, 2).overall()
    assert means["near_context"] == pytest.approx(0.9075, abs=5e-4)
    assert means["proximity"] == pytest.approx(2.590, abs=3e-3)
    assert means["close_pairs"] == pytest.approx(0.0224, abs=4e-4)
    assert means["nearest_in_group"] == pytest.approx(4.90, abs=3e-2)
    means = order_statistics(generate_orders("random", 400, sizes, 16), sizes, 16, 2).overall()
    assert means["near_context"] == pytest.approx(0.720, abs=3e-3)
    assert means["proximity"] == pytest.approx(2.223, abs=8e-3)
    assert means["close_pairs"] == pytest.approx(0.080, abs=2e-3)
    assert means["nearest_in_group"] == pytest.approx(3.06, abs=3e-2)


@pytest.mark.parametrize(("tau", "rho"), [(1.0, 2), (0.5, 1), (2.0, 3)])
def test_every_step_has_the_slow_versions_statistics(tau: float, rho: int) -> None:
    """Ties broken by an independent generator: a biased or repeating tie key would shift some step."""
    grid, num = (8, 6), 250
    sizes = cosine_group_sizes(48, 8)
    rng = np.random.default_rng(0)
    slow = np.array(
        [
            slow_order(sizes, grid, tau, rho, int(rng.integers(48)), lambda _: rng.random(48).tolist())
            for _ in range(num)
        ]
    )
    fast = generate_orders("lpd", 4 * num, sizes, grid, tau, rho, seed=2)

    def means_of_tens(orders: np.ndarray) -> np.ndarray:
        tens = (order_statistics(ten, sizes, grid, rho) for ten in np.split(orders, len(orders) // 10))
        return np.array([list(vars(means).values()) for means in tens])  # (tens, 4, steps)

    a, b = means_of_tens(slow), means_of_tens(fast)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b)) + 1e-9
    z = np.abs(a.mean(0) - b.mean(0)) / error
    assert np.nanmax(z) < 4.5


def test_ties_go_to_each_cell_equally_often() -> None:
    """χ² of the largest key within subsets of cells, and of the first cell, over 40,000 orders."""
    num, cells = 40_000, 100
    states, keys = order_states(np.arange(num), 3), TieKeys(np, cells, 25)
    out = np.empty((cells, num), np.int32)
    rng = np.random.default_rng(0)
    for step in (1, 2, 19):
        keys.draw(sub_states(states, step), out, np.empty_like(out))
        assert (out & 127 == np.arange(cells)[:, None]).all()
        for size in (2, 3, 9, 40, 100):
            subset = rng.choice(cells, size, replace=False)
            assert _chi2_z(np.bincount(out[subset].argmax(0), minlength=size)) < 4
    assert _chi2_z(np.bincount(uniform_cells(sub_states(states, 0), cells), minlength=cells)) < 4


def _chi2_z(counts: np.ndarray) -> float:
    """χ² against equal counts, in standard deviations above its mean."""
    freedom = len(counts) - 1
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return float((chi2 - freedom) / math.sqrt(2 * freedom))


def test_equal_proximities_are_exact_ties() -> None:
    """7e + 5c must sort the 25 neighbour counts as e + c/√2 does, without merging any two."""
    counts = [(e, c) for e in range(5) for c in range(5)]
    by_sum = sorted(counts, key=lambda n: n[0] + n[1] / math.sqrt(2))
    assert sorted(counts, key=lambda n: 7 * n[0] + 5 * n[1]) == by_sum
    assert len({7 * e + 5 * c for e, c in counts}) == 25
    assert [closeness(t) for t in (-1, 0, 0.5, 1, math.sqrt(2), 6.9)] == [0, 0, 5, 7, 10, 49]


def test_order_follows_from_seed_and_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, threads and neighbours must not matter; another seed or number must."""
    sizes = cosine_group_sizes(48, 8)
    all_at_once = generate_orders("lpd", 300, sizes, (6, 8), seed=9)
    picked = generate_orders("lpd", 3, sizes, (6, 8), seed=9, indices=[299, 4, 4])
    monkeypatch.setitem(draw._CHUNK_CELLS, "cpu", 7 * 48)
    chunked = generate_orders("lpd", 300, sizes, (6, 8), seed=9, workers=3)
    assert (all_at_once == chunked).all()
    assert (all_at_once[[299, 4, 4]] == picked).all()
    assert len(np.unique(all_at_once, axis=0)) == 300
    other = generate_orders("lpd", 300, sizes, (6, 8), seed=10)
    assert not (all_at_once == other).all(1).any()


def test_stored_orders_never_change() -> None:
    """The numbers behind seed 0 are a promise: results and files of earlier versions must stay reproducible."""
    order = generate_orders("lpd", 2, cosine_group_sizes(16, 5), 4, 1.0, 1)
    assert order.tolist() == [
        [2, 6, 12, 1, 3, 9, 15, 5, 7, 13, 10, 14, 8, 0, 11, 4],
        [2, 6, 12, 7, 5, 13, 15, 10, 3, 1, 8, 9, 11, 0, 14, 4],
    ]


@pytest.mark.parametrize("thresholds", ["lpd", "near only", "far only", "mixed"])
def test_torch_draws_what_numpy_draws(thresholds: str) -> None:
    """The code that a GPU runs, on torch's CPU tensors: same bits, types and shapes."""
    sizes = cosine_group_sizes(63, 8)
    taus, rhos = {
        "lpd": ((2.0,) * 8, (2,) * 8),
        "near only": ((0.0,) * 8, (0,) * 8),
        "far only": ((None,) * 8, (2,) * 8),
        "mixed": ((None, 1.0) * 4, (0, 1, 2, 3) * 2),
    }[thresholds]
    ours = lpd_orders(np, np.arange(40), sizes, (7, 9), taus, rhos, 4)
    theirs = lpd_orders(torch, torch.arange(40), sizes, (7, 9), taus, rhos, 4)
    assert theirs.dtype == torch.int16
    assert (ours == theirs.numpy()).all()


@pytest.mark.gpu
def test_gpu_draws_what_the_cpu_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(draw._CHUNK_CELLS, "cuda", 1999 * 256)
    sizes = group_sizes(256, 20)
    for kind in ("lpd", "lpd_far_only"):
        on_gpu = generate_orders(kind, 3000, sizes, 16, seed=1, device="cuda")
        assert (on_gpu == generate_orders(kind, 3000, sizes, 16, seed=1)).all()


def test_near_only_takes_the_closest_cells_and_far_only_ignores_them() -> None:
    sizes = cosine_group_sizes(64, 8)
    near = order_statistics(generate_orders("lpd_near_only", 200, sizes, 8), sizes, 8, 1).overall()
    far = order_statistics(generate_orders("lpd_far_only", 200, sizes, 8), sizes, 8, 1).overall()
    both = order_statistics(generate_orders("lpd", 200, sizes, 8), sizes, 8, 1).overall()
    assert near["near_context"] > both["near_context"] > far["near_context"]
    assert near["close_pairs"] > 5 * both["close_pairs"] > 5 * far["close_pairs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "spiral"}, "spiral"),
        ({"group_sizes": (2, 14)}, "first group size"),
        ({"group_sizes": (1, 14)}, "sum to 15"),
        ({"group_sizes": (1, 0, 15)}, "positive"),
        ({"group_sizes": ("1", 15)}, "positive"),
        ({"grid_size": 129, "group_sizes": (1, 129 * 129 - 1)}, "128"),
        ({"grid_size": 0}, "grid size"),
        ({"proximity_threshold": float("nan")}, "nan"),
        ({"proximity_threshold": (1.0,)}, "1 proximity thresholds are given for 2 steps"),
        ({"repulsion_threshold": (1, 1, 1)}, "3 repulsion thresholds are given for 2 steps"),
        ({"repulsion_threshold": -1}, "-1"),
        ({"repulsion_threshold": 1.5}, "1.5"),
        ({"seed": -1}, "-1"),
        ({"num": -1}, "-1"),
        ({"indices": [1]}, "indices"),
        ({"indices": [1, -2]}, "start at 0"),
        ({"workers": 0}, "workers"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"kind": "lpd", "num": 2, "group_sizes": (1, 15), "grid_size": 4}
    with pytest.raises(UserError, match=message):
        generate_orders(**(arguments | change))  # type: ignore[arg-type]


def test_no_orders_and_single_cells() -> None:
    assert generate_orders("lpd", 0, (1, 15), 4).shape == (0, 16)
    assert generate_orders("lpd", 2, (1,), 1).tolist() == [[0], [0]]
