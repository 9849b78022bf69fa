"""``python -m orders``: each command end to end on a small grid, and what it says to mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image, ImageSequence

from orders import generate_orders, group_sizes, load_orders
from orders.__main__ import main
from orders.draw import OrderSpec, default_repulsion
from orders.figures import TITLES, SteppedOrder
from orders.schedule import grid_group_sizes
from orders.statistics import order_statistics
from tests.helpers.commands import ROOT
from tests.helpers.commands import run as run_command
from tests.helpers.pictures import assert_mosaic, assert_text, pixels_of
from util.errors import UserError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["orders", *map(str, arguments)])
    main()


def test_generate_and_convert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file holds what :func:`generate_orders` draws, in either form and after conversion to and fro."""
    drawn = generate_orders("lpd", 20, group_sizes(128, 10), 8, 1.0, 2, seed=3)
    same = ["--img_size", 128, "--steps", 10, "--repulsion_threshold", 2, "--seed", 3, "--num", 20]
    run(monkeypatch, "generate", tmp_path / "a.json", *same, "--workers", 2)
    run(monkeypatch, "generate", tmp_path / "b.safetensors", *same)
    run(monkeypatch, "convert", "--grid", 8, tmp_path / "a.json", tmp_path / "c.safetensors")
    run(monkeypatch, "convert", "--grid", 8, tmp_path / "b.safetensors", tmp_path / "d.json")
    run(monkeypatch, "convert", "--grid", "8x8", tmp_path / "b.safetensors", tmp_path / "e.safetensors")
    paths = sorted(tmp_path.glob("*.json")) + sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == 5
    for path in paths:
        assert (load_orders(path, 8, group_sizes(128, 10)) == drawn).all()
    with pytest.raises(UserError, match="group_sizes"):
        load_orders(tmp_path / "e.safetensors", 8, group_sizes(128, 9))


def test_statistics_count_what_they_say() -> None:
    """By hand, on two 2×3 orders cut 1, 2, 3: the definitions of the published figures."""
    orders = np.array([[0, 1, 5, 2, 3, 4], [0, 4, 2, 5, 1, 3]])
    found = order_statistics(orders, (1, 2, 3), (2, 3), 1)
    assert found.near_context.tolist() == pytest.approx([0, (1 / 2 + 1 / 2) / 2, 1])
    root = 2**-0.5
    # First order: 1 beside 0, then 2, 3, 4 beside 0, 1, 5. Second: 4 diagonal to 0, 2 alone, then 5, 1, 3.
    assert found.proximity.tolist() == pytest.approx(
        [0, (1 / 2 + root / 2) / 2, ((2 + (1 + root) + (2 + root)) / 3 + (2 + 3 + 2) / 3) / 2]
    )
    assert np.isnan(found.close_pairs[0])
    assert found.close_pairs[1:].tolist() == pytest.approx([(1 + 1) / 2, (4 / 6 + 4 / 6) / 2])
    assert found.nearest_in_group[1:].tolist() == pytest.approx([2**0.5, ((2**0.5 + 1 + 1) / 3 + (2**0.5 * 3) / 3) / 2])
    assert found.overall()["near_context"] == pytest.approx(0.75)


def test_stats_prints_a_row_per_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(monkeypatch, "generate", tmp_path / "o.json", "--grid", 8, "--steps", 6, "--num", 50)
    capsys.readouterr()
    run(monkeypatch, "stats", "--grid", 8, "--steps", 6, "--num", 50)
    drawn = capsys.readouterr().out
    run(monkeypatch, "stats", "--grid", 8, "--steps", 6, "--file", tmp_path / "o.json")
    from_file = capsys.readouterr().out
    rows = [line for line in drawn.splitlines() if re.match(r" +\d+ +\d+ ", line)]
    assert len(rows) == 6
    assert drawn.splitlines()[1:] == from_file.splitlines()[1:]
    run(monkeypatch, "stats", "--grid", "1", "--group_sizes", "1")
    assert "nan" not in capsys.readouterr().out


def test_snapshot_marks_context_and_pairs() -> None:
    """The picture's colours and lines against the grid they show."""
    spec = OrderSpec("lpd", (3, 3), (1, 2, 6), 1.0, 1, 0)
    order = SteppedOrder(spec, np.array([4, 5, 8, 0, 1, 2, 3, 6, 7]))
    assert order.steps().tolist() == [[3, 3, 3], [3, 1, 2], [3, 3, 2]]
    states, pairs = order.snapshot(2)
    assert states.tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 2]]
    assert pairs.tolist() == [[[2, 1], [2, 2]]]  # (x, y)
    spec = OrderSpec("lpd", (3, 3), (1, 1, 7), 1.0, 1, 0)
    states, pairs = SteppedOrder(spec, np.array([0, 8, 1, 2, 3, 4, 5, 6, 7])).snapshot(2)
    assert states.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 3]]
    assert len(pairs) == 0


def test_every_kind_has_a_title() -> None:
    from orders import ORDER_KINDS

    assert set(TITLES) == set(ORDER_KINDS)


GRID, STEPS = (4, 6), 5
SAME = ["--grid", "4x6", "--steps", STEPS]
STATE_COLOURS = np.array([(244, 244, 244), (195, 200, 207), (27, 158, 119), (240, 163, 10)])  # states of a snapshot
RED = (215, 25, 28)


def drawn_order(kind: str) -> SteppedOrder:
    """Order number 0 of the pictures below."""
    spec = OrderSpec(kind, GRID, grid_group_sizes(GRID, STEPS), 1.0, default_repulsion(GRID), 0)
    return SteppedOrder(spec, spec.draw(np.array([0]))[0])


def step_colours(steps: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3), early (dark) to late (bright)."""
    return np.rint(colormaps["viridis"]((steps - 1) / (STEPS - 1))[..., :3] * 255).astype(np.uint8)


def test_drawing_has_each_cell_in_the_colour_of_its_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "draw", tmp_path / "one.png", *SAME, "--order", "zipar")
    picture = pixels_of(tmp_path / "one.png")
    rows, columns = assert_mosaic(picture, step_colours(drawn_order("zipar").steps()))
    assert_text(picture[: rows.start, columns])


def test_comparison_has_steps_and_a_snapshot_of_each_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "compare", tmp_path / "all.png", *SAME, "--orders", "lpd", "random")
    picture = pixels_of(tmp_path / "all.png")
    middle = picture.shape[1] // 2
    for panel, kind in ((picture[:, :middle], "lpd"), (picture[:, middle:], "random")):
        order = drawn_order(kind)
        rows, steps = assert_mosaic(panel, step_colours(order.steps()))
        _, snapshot = assert_mosaic(panel[rows], STATE_COLOURS[order.snapshot(3)[0]])
        assert steps.stop < snapshot.start
        assert_text(panel[: rows.start])


def test_animation_fills_the_grid_step_by_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A frame per step, with the newest cells in red, and one to rest on."""
    run(monkeypatch, "animate", tmp_path / "filling.gif", *SAME, "--orders", "lpd")
    steps = drawn_order("lpd").steps()
    with Image.open(tmp_path / "filling.gif") as image:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    assert len(frames) == STEPS + 1
    for number, frame in enumerate(frames, 1):
        colours = np.where((steps <= number)[..., None], step_colours(steps), STATE_COLOURS[0])
        colours[steps == number] = RED
        assert_mosaic(pixels_of(frame), colours, tolerance=6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "o.csv"], "o.csv"),
        (["generate", "o.json", "--num", "0"], "--num 0"),
        (["generate", "o.json", "--img_size", "250"], "image size 250"),
        (["generate", "o.json", "--grid", "8by8"], "8by8"),
        (["generate", "o.json", "--grid", "8x8x8"], "8x8x8"),
        (["generate", "o.json", "--grid", "0"], "'0'"),
        (["generate", "o.json", "--steps", "300"], "300"),
        (["generate", "o.json", "--group_sizes", "1,2,3"], "sum to 6"),
        (["generate", "o.json", "--group_sizes", "uniform:999"], "999"),
        (["generate", "o.json", "--repulsion_threshold", "-1"], "-1"),
        (["generate", "o.json", "--seed", "-1"], "seed -1"),
        (["generate", "o.json", "--workers", "0"], "workers 0"),
        (["generate", "o.json", "--device", "tpu"], "tpu"),
        (["convert", "none.json", "o.safetensors"], "none.json"),
        (["stats", "--file", "none.json"], "none.json"),
        (["draw", "o.gif"], "o.gif"),
        (["draw", "o.png", "--index", "-1"], "-1"),
        (["animate", "o.png"], "o.png"),
    ],
)
def test_mistakes_get_one_sentence_and_no_file(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(main, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_orders_need_no_torch() -> None:
    """Drawing orders must not cost the seconds that torch takes to import."""
    code = (
        "import sys, orders, orders.__main__; orders.generate_orders('lpd', 2, orders.group_sizes(256, 20), 16);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_published_files_have_their_published_names() -> None:
    script = (ROOT / "orders" / "run_lpd_order.sh").read_text()
    rows = re.findall(r"^(\d+) (\d+) (\d+)$", script, re.MULTILINE)
    assert rows == [("256", "20", "2"), ("256", "20", "3"), ("256", "32", "2"), ("512", "48", "4")]
    assert "orders/lpd_orders_generated/res${img_size}_steps${steps}_repulsion${repulsion}" in script


def test_specs_are_checked_where_they_are_made() -> None:
    with pytest.raises(UserError, match="sum to 4"):
        OrderSpec("lpd", (4, 4), (1, 3), 1.0, 1, 0)
