"""Files of orders: both forms, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orders import generate_orders, load_orders, save_orders
from orders.config import OrderConfig
from orders.draw import OrderSpec
from orders.files import load_schedule, read_spec, save_schedule
from util.errors import UserError

SIZES = (1, 3, 5, 7)
SPEC = OrderSpec("lpd", (4, 4), SIZES, 1.0, 1, 0)
FORMS = ["json", "safetensors"]


@pytest.fixture
def orders() -> np.ndarray:
    return generate_orders("lpd", 30, SIZES, 4)


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form: str, orders: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / f"orders.{form}"
    save_orders(path, orders, SPEC)
    loaded = load_orders(path, 4, SIZES)
    assert loaded.dtype == np.int16
    assert (loaded == orders).all()
    assert read_spec(path) == SPEC
    save_orders(path, orders.astype(np.int64))  # without a spec, another dtype, over the old file
    assert (load_orders(path, (4, 4)) == orders).all()


MIXED = OrderSpec("lpd", (4, 4), SIZES, (1.0, None, 0.0, 2.0), (1, 2, 0, 1), 5)


@pytest.mark.parametrize("spec", [SPEC, MIXED, OrderSpec("random", (4, 4), SIZES, 1.0, 1, 0)])
def test_a_schedule_file_is_taken_as_it_is(spec: OrderSpec, tmp_path: Path) -> None:
    """Group sizes, kind and the thresholds of each step; the seed is the run's."""
    save_schedule(tmp_path / "schedule.json", spec, {"bits_per_token": 3.0})
    orders = OrderConfig(schedule_file=tmp_path / "schedule.json").for_grid(4, seed=spec.seed)
    assert orders.spec == spec
    save_orders(tmp_path / "orders.json", spec.draw(np.arange(2)), spec)
    assert read_spec(tmp_path / "orders.json") == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [8, 8]}, r"is for grid \[8, 8\], but \[4, 4\] is asked for"),
        ({"format": "other"}, "is not a schedule file"),
        ({"group_sizes": [1, 3]}, "sum to 4"),
        ({"group_sizes": "1,3,5,7"}, "positive"),
        ({"proximity_threshold": [1.0]}, "1 proximity thresholds are given for 4 steps"),
        ({"proximity_threshold": "near"}, "something other than numbers"),
        ({"repulsion_threshold": None}, "something other than numbers"),
        ({"kind": "spiral"}, "spiral"),
    ],
)
def test_wrong_schedule_files(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    save_schedule(path, SPEC, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        load_schedule(path, 4, 0)
    assert "schedule.json" in str(caught.value)


@pytest.mark.parametrize(
    "also", [{"group_sizes": "1,15"}, {"order": "raster"}, {"proximity_threshold": 2.0}, {"repulsion_threshold": 1}]
)
def test_a_schedule_file_decides_alone(also: dict[str, object]) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        OrderConfig(schedule_file=Path("schedule.json"), **also)  # type: ignore[arg-type]


def test_json_is_the_published_form(orders: np.ndarray, tmp_path: Path) -> None:
    save_orders(tmp_path / "orders.json", orders)
    assert json.loads((tmp_path / "orders.json").read_text()) == orders.tolist()
    (tmp_path / "spaced.json").write_text(json.dumps(orders.tolist(), indent=1))
    assert (load_orders(tmp_path / "spaced.json", 4) == orders).all()


def test_binary_form_is_compact_and_readable_by_the_library(orders: np.ndarray, tmp_path: Path) -> None:
    """Two bytes a token, so 60,000 × 1024 take 123 MB."""
    path = tmp_path / "orders.safetensors"
    save_orders(path, np.asfortranarray(orders), SPEC)
    assert path.stat().st_size < 2 * orders.size + 500
    assert (load_file(path)["orders"] == orders).all()


def test_a_binary_file_of_an_earlier_version_still_loads(tmp_path: Path) -> None:
    """Its header was written by hand: another length and another order of keys than the library's."""
    path = tmp_path / "earlier.safetensors"
    path.write_bytes(
        b'\xf0\x00\x00\x00\x00\x00\x00\x00{"__metadata__": {"settings": "{\\"kind\\": \\"lpd\\", \\"grid\\": [2, 2], '
        b'\\"group_sizes\\": [1, 3], \\"proximity_threshold\\": 1.0, \\"repulsion_threshold\\": 1, \\"seed\\": 0}"}, '
        b'"orders": {"dtype": "I16", "shape": [3, 4], "data_offsets": [0, 24]}}   '
        b"\x00\x00\x01\x00\x02\x00\x03\x00\x00\x00\x01\x00\x02\x00\x03\x00\x00\x00\x02\x00\x01\x00\x03\x00"
    )
    assert load_orders(path, 2, (1, 3)).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 1, 3]]
    assert read_spec(path) == OrderSpec("lpd", (2, 2), (1, 3), 1.0, 1, 0)
    with pytest.raises(UserError, match="group_sizes"):
        load_orders(path, 2, (1, 1, 2))


@pytest.mark.parametrize("form", FORMS)
def test_interrupted_writing_leaves_the_old_file(
    form: str, orders: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"orders.{form}"
    save_orders(path, orders[:3])

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_orders(path, orders)
    assert len(load_orders(path, 4)) == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", FORMS)
def test_cut_short_anywhere(form: str, orders: np.ndarray, tmp_path: Path) -> None:
    """Guards against a half-copied file that is taken for a smaller one."""
    path = tmp_path / f"orders.{form}"
    save_orders(path, orders, SPEC)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=path.name):
            load_orders(path, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no orders"),
        ("{}", "cut short, or not a JSON"),
        ("", "cut short"),
        ("]", "after 0 rows"),
        ("[[0, 1, 2, 3], ]", "after 1 rows"),
        ("[[0, 1, 2, 3]]x", "not a JSON list of lists, after 1 rows"),
        ("[[0, 1, 2, 3] [0, 1, 2, 3]]", "after 1 rows"),
        ("[[0, 1, 2, 3], [0, 1, 2]]", "row 1: expected 4 integers"),
        ("[[0, 1, 2, 3.0]]", "row 0: expected 4 integers"),
        ('[[0, 1, 2, "3"]]', "row 0"),
        ("[[0, 1, 2, 3], [0, 1, 2, 99999999999999999999]]", "row 1"),
        ("[[0, 1, 2, 65539]]", "row 0: not a permutation"),  # 3 in 16 bits
        ("[[0, 1, 2, 4]]", "row 0: not a permutation"),
        ("[[0, 1, 2, -1]]", "row 0: not a permutation"),
        ("[[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 2]]", "row 2: not a permutation of the cells 0 … 3"),
        ("[[0, 1, 2 3, 3]]", "row 0: expected"),
        ("[[0, 1,, 3]]", "row 0: expected"),
        ("[[0, 1, - 2, 3]]", "row 0"),
        ("[0, 1, 2, 3]", "not a JSON list of lists"),
        ("[[true, false, true, true]]", "row 0"),
        ("[[0, true, 2, 3]]", "row 0: expected"),
        ("[[0, 1, 2, 3e0]]", "row 0: expected"),
        ("[[0, 1, 2, [3]]]", "row 0: expected"),
        ("[[0, 1, 2, 3], {}]", "after 1 rows"),
        pytest.param("[[0, 1, 2, " + "9" * 5000 + "]]", "row 0: expected", id="5000 digits"),
        pytest.param("[" * 100_000, "row 0: expected", id="nested deep"),
        pytest.param(" " * 1_000_000, "cut short", id="blanks"),
    ],
)
def test_wrong_json_is_refused_by_name_and_row(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_orders(path, 2)
    assert str(path) in str(error.value)


def test_wrong_binary_is_refused(orders: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    wrong = orders.copy()
    wrong[17, 3] = wrong[17, 4]
    save_orders(path, wrong)
    with pytest.raises(UserError, match="row 17: not a permutation"):
        load_orders(path, 4)
    for tensors in ({"orders": orders.astype(np.int64)}, {"orders": orders[0]}, {"weights": orders}):
        save_file(tensors, path)
        with pytest.raises(UserError, match=r"o\.safetensors"):
            load_orders(path, 4)


@pytest.mark.parametrize("form", FORMS)
def test_another_grid_or_schedule_is_refused(form: str, orders: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / f"orders.{form}"
    save_orders(path, orders, SPEC)
    with pytest.raises(UserError, match="grid"):
        load_orders(path, 5)
    with pytest.raises(UserError, match="grid"):
        load_orders(path, (2, 8))
    with pytest.raises(UserError, match="group_sizes"):
        load_orders(path, 4, (1, 15))
    published = tmp_path / f"res64_steps4_repulsion1.{form}"
    save_orders(published, orders)
    assert len(load_orders(published, 4, SIZES)) == 30
    with pytest.raises(UserError, match="4 steps, but 2"):
        load_orders(published, 4, (1, 15))


def test_record_beside_a_json_file_is_of_that_file_alone(orders: np.ndarray, tmp_path: Path) -> None:
    """A file that came later under the same name must not be refused for what an earlier one was made for."""
    path = tmp_path / "orders.json"
    save_orders(path, orders, SPEC)
    path.write_text(json.dumps(orders[:9].tolist()))
    assert len(load_orders(path, 4, (1, 15))) == 9
    assert read_spec(path) is None


@pytest.mark.parametrize("name", ["missing.json", "missing.safetensors", "orders.txt", "."])
def test_no_such_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist" if name.startswith("missing") else "must end in"):
        load_orders(tmp_path / name, 4)
    if name == "orders.txt":
        with pytest.raises(UserError, match="json or"):
            save_orders(tmp_path / name, np.zeros((1, 16)))
        assert not (tmp_path / name).exists()
