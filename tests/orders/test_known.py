"""Orders of a part of a picture: known cells come first, and the others grow from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from orders import draw
from orders.config import OrderConfig
from orders.draw import ORDER_KINDS, OrderSpec
from orders.lpd_order import lpd_orders
from orders.order_states import TieKeys, order_states, sub_states
from orders.schedule import grid_group_sizes, hole_group_sizes
from tests.helpers.holes import holes
from tests.helpers.orders_oracle import slow_order
from util.errors import UserError

GRID = 7
HOLES = {name: hole for name, hole in holes(GRID).items() if not hole.all()}


def spec_of(hole: np.ndarray, kind: str = "lpd", steps: int = 9, rho: int = 1, seed: int = 3) -> OrderSpec:
    known = np.flatnonzero(~hole).tolist()
    config = OrderConfig(order=kind, generation_steps=steps, repulsion_threshold=rho)
    return config.for_grid(len(hole), seed, known=known).spec


@pytest.mark.parametrize("kind", ORDER_KINDS)
@pytest.mark.parametrize("name", HOLES)
def test_known_cells_come_first_and_every_other_once(kind: str, name: str) -> None:
    spec = spec_of(HOLES[name], kind)
    known = np.flatnonzero(~HOLES[name])
    orders = np.broadcast_to(spec.draw(np.arange(4)), (4, GRID**2))
    assert spec.group_sizes[0] == len(known)
    assert (orders[:, : len(known)] == known).all()
    assert (np.sort(orders, axis=1) == np.arange(GRID**2)).all()


@pytest.mark.parametrize("name", HOLES)
def test_they_grow_from_the_known_region_by_the_rules(name: str) -> None:
    """Against the slow version with the same luck: the first step already counts the proximity to known cells."""
    for rho in (0, 1, 2):
        spec = spec_of(HOLES[name], rho=rho)
        for index, order in enumerate(spec.draw(np.arange(3)).tolist()):
            states, keys = order_states(np.array([index]), spec.seed), TieKeys(np, GRID**2, 25)

            def ties(step: int, states: np.ndarray = states, keys: TieKeys = keys) -> list[float]:
                out = np.empty((GRID**2, 1), np.int32)
                return keys.draw(sub_states(states, step), out, np.empty_like(out))[:, 0].tolist()

            expected = slow_order(spec.group_sizes, spec.grid, 1.0, rho, list(spec.known), ties)
            assert order == expected, (rho, index)


def test_an_order_follows_from_seed_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drawn beside it, in chunks of any size, by NumPy or by torch."""
    spec = spec_of(HOLES["many"])
    whole = spec.draw(np.arange(20))
    assert (spec.draw(np.array([17, 3])) == whole[[17, 3]]).all()
    assert not (whole[1:] == whole[0]).all(axis=1).any()
    steps = len(spec.group_sizes)
    rest = spec.group_sizes, spec.grid, (1.0,) * steps, (1,) * steps, spec.seed, spec.known
    assert (lpd_orders(torch, torch.arange(20), *rest).numpy() == whole).all()
    monkeypatch.setitem(draw._CHUNK_CELLS, "cpu", 3 * GRID**2)
    assert (spec.draw(np.arange(20)) == whole).all()
    assert not (spec_of(HOLES["many"], seed=4).draw(np.arange(20)) == whole).all()


def test_steps_of_a_hole_follow_from_its_side() -> None:
    """The whole picture keeps its schedule; a hole of a quarter of the cells takes half the steps; one cell one."""
    assert hole_group_sizes(16, 20, 256) == grid_group_sizes(16, 20)
    assert len(hole_group_sizes(16, 20, 64)) == 10
    assert hole_group_sizes(16, 20, 1) == (1,)
    assert hole_group_sizes(16, 20, 0) == ()
    counts = [len(hole_group_sizes(16, 20, hole)) for hole in range(1, 257)]
    assert counts == sorted(counts)
    assert all(sum(hole_group_sizes(16, 20, hole)) == hole for hole in range(257))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be different cells of the grid, 0 to 15"):
        OrderSpec("lpd", (4, 4), (2, 14), 1.0, 1, 0, (3, 3))
    with pytest.raises(UserError, match="must be different cells of the grid, 0 to 15"):
        OrderSpec("random", (4, 4), (2, 14), 1.0, 1, 0, (3, 16))
    with pytest.raises(UserError, match="2 cells are known, but the first group has 1"):
        OrderSpec("lpd", (4, 4), (1, 15), 1.0, 1, 0, (3, 4))
    with pytest.raises(UserError, match="number of steps 17"):
        OrderConfig(generation_steps=17).for_grid(4, 0, known=[0])
    with pytest.raises(UserError, match="is for whole pictures"):
        OrderConfig(lpd_order_file=tmp_path / "orders.json").for_grid(4, 0, known=[0])
    with pytest.raises(UserError, match="sum to 16, but the grid has 15"):
        OrderConfig(group_sizes="8,8").for_grid(4, 0, known=[0])
