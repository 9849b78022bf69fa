"""Group sizes: the published tables, the cosine for everything else, and a user's own lists."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import pytest

from orders import group_sizes, natural_group_sizes, parse_group_sizes, published_group_sizes, read_schedules
from orders.schedule import cosine_group_sizes, grid_shape, uniform_group_sizes
from tests.helpers.commands import DATA, ROOT
from util.errors import UserError

PUBLISHED = json.loads((DATA / "orders_group_sizes.json").read_text())


def _cosine(num_tokens: int, steps: int) -> list[int]:
    angles = [math.pi * s / (2 * steps) for s in range(steps + 1)]
    return [math.floor(num_tokens * (math.cos(a) - math.cos(b)) + 0.5) for a, b in itertools.pairwise(angles)]


@pytest.mark.parametrize("img_size", [256, 512])
def test_published_rows_are_copied_without_a_slip(img_size: int) -> None:
    rows = {int(steps): tuple(sizes) for steps, sizes in PUBLISHED[str(img_size)].items()}
    assert published_group_sizes(img_size) == list(rows.values())
    for steps, sizes in rows.items():
        assert group_sizes(img_size, steps) == sizes
        assert len(sizes) == steps
        assert sum(sizes) == (img_size // 16) ** 2


def test_the_table_goes_by_the_grid_and_not_by_the_pixels() -> None:
    assert group_sizes(64, 20, stride=4) == group_sizes(256, 20)
    assert published_group_sizes(512, stride=32) == published_group_sizes(256)
    assert group_sizes(256, 20, stride=8) == cosine_group_sizes(1024, 20)  # a 32×32 grid, which has no row of 20


def test_cosine_keeps_every_promise_for_all_small_grids_and_steps() -> None:
    """Guards against a sum that is off by the rounding, decreasing sizes, empty groups and needless deviation."""
    for tokens in [*range(1, 70), 100, 144, 1024]:
        for steps in range(1, tokens + 1, 1 if tokens < 200 else 41):
            sizes = cosine_group_sizes(tokens, steps)
            assert sum(sizes) == tokens
            assert len(sizes) == steps
            assert list(sizes) == sorted(sizes)
            assert sizes[0] == (1 if steps > 1 else tokens)
            assert min(sizes) >= 1
            wanted = _cosine(tokens, steps)[1:]
            least, most = 1 + sum(max(1, size - 1) for size in wanted), 1 + sum(size + 1 for size in wanted)
            if steps > 1 and least <= tokens <= most:
                assert all(abs(size - want) <= 1 for size, want in zip(sizes[1:], wanted, strict=True)), (tokens, steps)


def test_cosine_matches_the_published_rows_to_within_one() -> None:
    """The published tables are roundings of the same curve: a wrong quarter of the cosine would show here."""
    for sizes in published_group_sizes(256)[3:]:
        wanted = _cosine(256, len(sizes))[1:]
        assert max(abs(size - want) for size, want in zip(sizes[1:], wanted, strict=True)) <= 1


def test_training_schedules_of_another_grid() -> None:
    schedules = published_group_sizes(32, stride=4)
    assert [len(sizes) for sizes in schedules] == [64, 32, 16, 8, 6, 5, 4, 3, 2]
    assert all(sum(sizes) == 64 and sizes[0] == 1 for sizes in schedules)
    assert published_group_sizes(16) == [(1,)]
    assert [len(sizes) for sizes in published_group_sizes(32)] == [4, 2]


@pytest.mark.parametrize(("tokens", "steps", "expected"), [(10, 4, (1, 3, 3, 3)), (12, 4, (1, 3, 4, 4)), (7, 1, (7,))])
def test_uniform(tokens: int, steps: int, expected: tuple[int, ...]) -> None:
    assert uniform_group_sizes(tokens, steps) == expected


@pytest.mark.parametrize(("img_size", "steps"), [(256, 0), (256, 257), (250, 20), (0, 1), (256, -3)])
def test_impossible_schedules_are_refused(img_size: int, steps: int) -> None:
    with pytest.raises(UserError, match=str(steps if img_size == 256 else img_size)):
        group_sizes(img_size, steps)


@pytest.mark.parametrize("text", ["1,3,5,7", "[1, 3, 5, 7]", " 1 , 3,5,7 "])
def test_own_group_sizes(text: str, tmp_path: Path) -> None:
    assert parse_group_sizes(text, 16) == (1, 3, 5, 7)
    path = tmp_path / "sizes.json"
    path.write_text(text)
    assert parse_group_sizes(str(path), 16) == (1, 3, 5, 7)
    assert parse_group_sizes("uniform:4", 16) == (1, 5, 5, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "1,3,5",
        "1,0,15",
        "-1,17",
        "1;15",
        "1.5,14.5",
        "[1,15",
        "[[1],15]",
        "__import__('os')",
        "no.json",
    ],
)
def test_bad_group_sizes_are_named_and_never_run(text: str) -> None:
    """Guards against the published ``eval`` on this flag."""
    named = {"1,3,5": "sum to 9", "no.json": "'no.json' does not exist"}.get(text, "must be positive integers")
    with pytest.raises(UserError, match=named):
        parse_group_sizes(text, 16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1]*16", (1,) * 16),
        ("16*[1]", (1,) * 16),
        ("[1]*2+[2]*3+[8]", (1, 1, 2, 2, 2, 8)),
        (" [1, 3] * 3 +\t[ 4 ]\n", (1, 3, 1, 3, 1, 3, 4)),
        ("2 * [ 1,7 ]", (1, 7, 1, 7)),
        ("[1]+[15]", (1, 15)),
    ],
)
def test_published_expressions(text: str, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert parse_group_sizes(text, 16) == expected
    (tmp_path / "sizes.txt").write_text(text)
    assert parse_group_sizes(str(tmp_path / "sizes.txt"), 16) == expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "[1]*(2**40)",
        "[1]*10**9",
        "[1]*99999999999999999999",
        "[[1]]*2",
        "[1]*-1",
        "[1]*0",
        "[0]*1000000000000",
        "[1]*16+[]",
        "[1]*8*2",
        "[1]*16+",
        "([1]*16)",
        "[True]*256",
        "[1.0]*16",
        "[1]*1 6",
        "[1 3]*4",
        "[١]*16",
        pytest.param("[" * 50_000 + "]" * 50_000, id="nested deep"),
        pytest.param(" " * 50_000 + "1" + " " * 50_000 + "x", id="blanks"),
        pytest.param("[" + "1," * 50_000, id="long list"),
        pytest.param("9" * 100_000, id="long number"),
        pytest.param("+".join(["[1]*2"] * 20_000) + "*", id="long sum"),
    ],
)
def test_other_expressions_are_refused_in_one_short_sentence(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"^group sizes ['\"].* must be positive integers") as error:
        parse_group_sizes(text, 16)
    assert len(str(error.value)) < 250
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("text", "total"), [("[1]*99999999999", "99999999999"), ("[1]*15", "15"), ("[5]*4", "20")])
def test_expressions_must_sum_to_the_tokens(text: str, total: str) -> None:
    """Guards against a list that fills the memory before anyone looks at its length."""
    with pytest.raises(UserError, match=f"sum to {total}, but the grid has 16 tokens"):
        parse_group_sizes(text, 16)


def test_schedules_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("[[1, 15],\n [1, 3, 5, 7]]")
    assert read_schedules(path, 16) == [(1, 15), (1, 3, 5, 7)]
    for img_size, tokens in ((256, 256), (512, 1024)):
        published = ROOT / "orders" / "group_sizes_training" / f"group_sizes_{img_size}.json"
        assert read_schedules(published, tokens) == published_group_sizes(img_size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, 15], [1, 3, 5]]", "row 1: expected positive integers that sum to 16"),
        ("[[0, 16]]", "row 0"),
        ("[[-1, 17]]", "row 0"),
        ("[[1, 15], []]", "row 1"),
        ("[[true, 15]]", "row 0"),
        ("[[1.0, 15]]", "row 0"),
        ("[1, 15]", "after 0 rows"),
        ("[]", "no schedules"),
        ("[[1, 15]", "cut short"),
        ("[[1, 15], [1, 3,", "row 1"),
        ("\xff", "cut short"),
        ('{"sizes": [[1, 15]]}', "not a JSON list of lists"),
        pytest.param(f"[[{'9' * 4000}, {'9' * 5000}]]", "row 0", id="many digits"),
    ],
)
def test_wrong_schedules_are_refused_by_name_and_row(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        read_schedules(path, 16)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        read_schedules(tmp_path / "none.json", 16)


def test_natural_group_sizes() -> None:
    """Step counts that the papers state: PAR's 51 for 24×24 tokens in 16 regions, NAR's 2n−1."""
    assert len(natural_group_sizes("par", 24)) == 51
    assert natural_group_sizes("par", 16) == (1,) * 16 + (16,) * 15
    assert natural_group_sizes("nar", 3) == (1, 2, 3, 2, 1)
    assert natural_group_sizes("zipar", (3, 4)) == (1, 1, 2, 2, 2, 2, 1, 1)
    assert natural_group_sizes("raster", (2, 3)) == (1,) * 6
    assert natural_group_sizes("lpd", 16) == group_sizes(256, 20)
    assert natural_group_sizes("halton", 16, 32) == group_sizes(256, 32)
    with pytest.raises(UserError, match="31 steps"):
        natural_group_sizes("nar", 16, 20)


@pytest.mark.parametrize("grid", [0, -4, 2.5, "16", (4,) * 3, (4, 0), None])
def test_bad_grids_are_refused(grid: object) -> None:
    with pytest.raises(UserError, match="grid size"):
        grid_shape(grid)  # type: ignore[arg-type]
