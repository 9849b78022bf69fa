"""The orders of other papers against their definitions, worked out by brute force."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from orders import ORDER_KINDS, generate_orders, natural_group_sizes

GRIDS = [(16, 16), (6, 10), (5, 3), (1, 7), (7, 1), (1, 1), (3, 3)]


def one_order(kind: str, grid: tuple[int, int]) -> list[int]:
    return generate_orders(kind, 1, natural_group_sizes(kind, grid), grid)[0].tolist()


def groups(kind: str, grid: tuple[int, int]) -> list[list[int]]:
    order = iter(one_order(kind, grid))
    return [list(itertools.islice(order, size)) for size in natural_group_sizes(kind, grid)]


@pytest.mark.parametrize("kind", ORDER_KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_kind_is_a_permutation_of_any_grid(kind: str, grid: tuple[int, int]) -> None:
    """Every position decoded exactly once, also on grids that are narrow, odd or a single cell."""
    orders = generate_orders(kind, 3, natural_group_sizes(kind, grid), grid, seed=1)
    assert orders.dtype == np.int16
    assert (np.sort(orders, axis=1) == np.arange(grid[0] * grid[1])).all()
    assert (orders[2] == generate_orders(kind, 1, natural_group_sizes(kind, grid), grid, seed=1, indices=[2])[0]).all()


def test_raster() -> None:
    assert one_order("raster", (2, 3)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("grid", [(4, 4), (5, 9), (16, 16)])
def test_halton_visits_cells_as_the_sequence_does(grid: tuple[int, int]) -> None:
    """Exact fractions: a float that is rounded across the edge of a cell would change the order."""

    def mirrored(number: int, base: int) -> Fraction:
        result, weight = Fraction(0), Fraction(1, base)
        while number:
            number, digit = divmod(number, base)
            result, weight = result + digit * weight, weight / base
        return result

    h, w = grid
    visited: dict[int, None] = {}
    for number in itertools.count(1):
        visited.setdefault(int(mirrored(number, 2) * h) * w + int(mirrored(number, 3) * w))
        if len(visited) == h * w:
            break
    assert one_order("halton", grid) == list(visited)


@pytest.mark.parametrize("side", [2, 8, 16])
def test_checkerboard_is_spread_evenly_over_all_quadtree_cells(side: int) -> None:
    """In any run of the order, so in every step of any schedule and in all that is known before it."""
    rows, columns = np.divmod(np.array(one_order("checkerboard", (side, side))), side)
    for level in range(1, side.bit_length()):
        size = side >> level
        cells = rows // size * 2**level + columns // size
        of_cell = np.eye(4**level, dtype=int)[cells].cumsum(0)
        for start, stop in itertools.combinations(range(side**2 + 1), 2) if side < 16 else ((0, 100), (37, 200)):
            counts = of_cell[stop - 1] - (of_cell[start - 1] if start else 0)
            assert counts.max() - counts.min() <= 1, (level, start, stop)


def test_checkerboard_half_way_is_one() -> None:
    order = np.array(one_order("checkerboard", (16, 16)))
    assert set((order[:128] // 16 + order[:128] % 16) % 2) == {0}


@pytest.mark.parametrize("grid", [(6, 10), (5, 3), (12, 12), (1, 7)])
def test_checkerboard_halves_any_grid_evenly(grid: tuple[int, int]) -> None:
    """A prefix of the order has in each quadrant the share of its cells, to within one cell more than in a square."""
    rows, columns = np.divmod(np.array(one_order("checkerboard", grid)), grid[1])
    quadrants = (rows >= (grid[0] + 1) // 2) * 2 + (columns >= (grid[1] + 1) // 2)
    order = np.eye(4, dtype=int)[quadrants].cumsum(0)
    for count in range(1, len(rows) // 2):
        found = order[count - 1][order[-1] > 0]
        assert found.max() - found.min() <= 1, count


@pytest.mark.parametrize("grid", [(16, 16), (8, 12), (10, 7)])
def test_par_takes_one_token_of_each_region(grid: tuple[int, int]) -> None:
    """First the corners one by one, then the same place of every region at once (those that have it)."""
    rows, cols = (np.array_split(np.arange(side), 4) for side in grid)
    corners = [int(r[0] * grid[1] + c[0]) for r in rows for c in cols]
    parts = groups("par", grid)
    assert [cell for part in parts[:16] for cell in part] == corners
    assert all(len(part) == 1 for part in parts[:16])
    places: list[tuple[int, int]] = []
    for part in parts[16:]:
        place, regions = set(), set()
        for cell in part:
            for (i, r), (j, c) in itertools.product(enumerate(rows), enumerate(cols)):
                if cell // grid[1] in r and cell % grid[1] in c:
                    place.add((int(cell // grid[1] - r[0]), int(cell % grid[1] - c[0])))
                    regions.add((i, j))
        assert len(place) == 1
        assert len(regions) == len(part)
        places += place
    assert places == sorted(set(places))


@pytest.mark.parametrize("grid", [(16, 16), (3, 8), (5, 2), (4, 1)])
def test_zipar_is_what_its_rule_simulates(grid: tuple[int, int]) -> None:
    """Each step every row whose predecessor is two tokens ahead (or complete) generates its next token."""
    h, w = grid
    done, steps = [0] * h, []
    while min(done) < w:
        ready = [r for r in range(h) if done[r] < w and (r == 0 or done[r - 1] >= min(w, done[r] + 2))]
        steps.append([r * w + done[r] for r in ready])
        for r in ready:
            done[r] += 1
    assert groups("zipar", grid) == steps


@pytest.mark.parametrize("grid", [(16, 16), (3, 8)])
def test_nar_expands_by_manhattan_distance(grid: tuple[int, int]) -> None:
    for distance, part in enumerate(groups("nar", grid)):
        assert sorted(part) == [r * grid[1] + c for r in range(grid[0]) for c in range(grid[1]) if r + c == distance]


def test_random_orders_are_uniform() -> None:
    """All 24 permutations of four cells, and each cell at each place of a longer order, equally often."""
    small = generate_orders("random", 24_000, (4,), 2, seed=5) @ np.array([64, 16, 4, 1])
    counts = np.unique(small, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)
    orders = generate_orders("random", 6400, (64,), 8, seed=6)
    at = np.stack([np.bincount(orders[:, place], minlength=64) for place in range(64)])
    assert abs(at - 100).max() < 55
    assert not (orders[1:] == orders[:-1]).all(1).any()
