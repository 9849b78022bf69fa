"""The suite for a GPU: its parts, time limits and failures with parts made up here; its tables; all of it, tiny."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.recipes import EVAL_RECIPES
from experiments.cifar10 import run as cifar10
from experiments.produce import run as produce
from scripts import gpu_suite, gpu_tables
from scripts.benchmark_evaluation import EvaluationBenchmark
from scripts.benchmark_latency import LatencyBenchmark
from scripts.benchmark_orders import OrdersBenchmark
from scripts.benchmark_train import TrainBenchmark
from scripts.gpu_suite import Part, Parts, Suite, SuiteConfig
from scripts.tune_kernels import TuneConfig
from tests.helpers.commands import ROOT, run
from tests.helpers.processes import holder
from tests.helpers.slurm_cluster import wait_until
from util.cli import Parser, from_args
from util.errors import UserError
from util.files import write_json

GPU = {"device": "a GPU", "driver": "570.1", "cuda": "12.8", "torch": "2.11.0", "triton": "3.6.0"}
REVISION = "0123456789" * 4
BENCHMARKS = {
    "scripts.benchmark_latency": LatencyBenchmark,
    "scripts.benchmark_orders": OrdersBenchmark,
    "scripts.benchmark_train": TrainBenchmark,
    "scripts.benchmark_evaluation": EvaluationBenchmark,
    "scripts.tune_kernels": TuneConfig,
}


def gpu_parts(**settings: Any) -> list[Part]:
    return Parts(SuiteConfig(**settings), Path("/out"), True)()


def test_parts_of_a_gpu_cover_what_is_published_in_order_of_worth() -> None:
    for quick in (False, True):
        parts = gpu_parts(quick=quick, photos=ROOT, produce=ROOT)
        assert tuple(dict.fromkeys(part.group for part in parts)) == gpu_suite.GROUPS
        names = [part.name for part in parts]
        assert len(set(names)) == len(names) == len({part.result for part in parts})
        rows = [part.words[part.words.index("--rows") + 1] for part in parts if "--rows" in part.words]
        assert rows == [gpu_suite.FIRST_ROW, gpu_suite.FIRST_ROW, *EVAL_RECIPES]
    assert [part.name for part in gpu_parts(parts=("orders", "train"))] == ["orders", "train"]
    assert sum(part.seconds for part in gpu_parts(quick=True)) < sum(part.seconds for part in gpu_parts()) / 2


def test_experiments_on_photographs_are_parts_that_resume_and_take_their_flags() -> None:
    for tiny, scales in ((False, ["gpu", "full"]), (True, ["tiny", "tiny"])):
        parts = gpu_parts(photos=ROOT, produce=ROOT, parts=("photos",), tiny=tiny)
        assert [part.name for part in parts] == ["produce", "cifar10"]
        for part, experiment, scale in zip(parts, (produce, cifar10), scales, strict=True):
            args = experiment.EXPERIMENT.parse(list(part.words[2:]))
            assert (args.scale, args.data, part.resumable) == (scale, ROOT, True)
            assert part.result.parent == args.output_dir / "report"


@pytest.mark.parametrize("settings", [{}, {"quick": True}, {"tiny": True}, {"inception_path": ROOT / "README.md"}])
def test_flags_of_every_part_are_those_of_its_command(settings: dict[str, Any]) -> None:
    """Guards against a flag that only fails on a GPU, where time is scarce."""
    checked = 0
    for part in gpu_parts(**settings):
        if part.words[1] in BENCHMARKS:
            parser, cls = Parser(), BENCHMARKS[part.words[1]]
            parser.add_config(cls)
            config: Any = from_args(cls, parser.parse_args(part.words[2:]))
            assert config.output == part.result
            checked += 1
    assert checked == (6 if "tiny" in settings else 13)


def made_up(out: Path, name: str, code: str, seconds: float = 0, resumable: bool = False) -> Part:
    result = out / f"{name}.json"
    done = f"open({str(result)!r}, 'w').write('{{}}')"
    return Part("orders", name, ("-c", f"{code}; {done}"), seconds, result, resumable)


def suite_of(out: Path, parts: Sequence[Part], time_limit: float | None = None, **conditions: str) -> Suite:
    return Suite(parts, out, SuiteConfig(output_dir=out, time_limit=time_limit), GPU | conditions)


def states(out: Path) -> dict[str, str]:
    return {name: part["state"] for name, part in json.loads((out / "summary.json").read_text())["parts"].items()}


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    ran = f"open({str(tmp_path / 'ran')!r}, 'a').write('{{}} ')"
    fails = f"{ran.format('fails')}; print('before'); raise OSError('the very end')"
    parts = [made_up(tmp_path, "fails", fails), made_up(tmp_path, "works", ran.format("works"))]
    assert suite_of(tmp_path, parts).run() == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {key: summary[key] for key in GPU} == GPU
    fails_entry, works_entry = summary["parts"]["fails"], summary["parts"]["works"]
    assert (fails_entry["state"], works_entry["state"]) == ("failed", "finished")
    assert fails_entry["error"].startswith("status 1\nbefore\n")
    assert fails_entry["error"].endswith("OSError: the very end")
    assert (works_entry["result"], works_entry["error"]) == ("works.json", None)
    assert str(tmp_path) not in works_entry["command"]
    assert works_entry["seconds"] > 0
    later = [*parts, made_up(tmp_path, "later", ran.format("later"))]
    assert suite_of(tmp_path, later).run() == 1
    assert (tmp_path / "ran").read_text().split() == ["fails", "works", "later", "fails"]
    mended = [made_up(tmp_path, "fails", "pass"), *later[1:]]
    assert suite_of(tmp_path, mended).run() == 0
    assert set(states(tmp_path).values()) == {"finished"}
    with pytest.raises(UserError, match="holds results of device a GPU, this is another"):
        suite_of(tmp_path, parts, device="another")


def test_a_part_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    parts = [made_up(tmp_path, "long", "pass", seconds=1000), made_up(tmp_path, "short", "pass", seconds=1)]
    assert suite_of(tmp_path, parts, 60).run() == 75
    assert states(tmp_path) == {"short": "finished"}
    with pytest.raises(UserError, match="no part fits into --time_limit; the shortest that is left takes about 1000 s"):
        suite_of(tmp_path, parts[:1], 60).run()
    assert suite_of(tmp_path, parts).run() == 0
    assert suite_of(tmp_path, parts, 1).run() == 0  # nothing is left that would have to fit


def test_what_can_never_fit_is_named_whatever_else_is_finished_or_fails(tmp_path: Path) -> None:
    """Guards against calls that end with 75, "again", for ever."""
    parts = [
        made_up(tmp_path, "long", "pass", seconds=1000),
        made_up(tmp_path, "short", "pass"),
        made_up(tmp_path, "fails", "raise OSError"),
    ]
    assert suite_of(tmp_path, parts, 60).run() == 75
    for rest in (parts, parts[:2]):
        with pytest.raises(UserError, match="no part fits into --time_limit"):
            suite_of(tmp_path, rest, 60).run()
    assert states(tmp_path) == {"short": "finished", "fails": "failed"}


def test_the_revision_of_a_working_tree(tmp_path: Path) -> None:
    assert gpu_suite.revision(tmp_path) is None
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run((*git, "init", "-q"), check=True)
    assert gpu_suite.revision(tmp_path) is None  # no commit
    subprocess.run((*git, "commit", "-q", "--allow-empty", "-m", "first"), check=True)
    clean = gpu_suite.revision(tmp_path)
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "new.py").touch()
    assert gpu_suite.revision(tmp_path) == f"{clean}-dirty"


def test_parts_of_another_revision_are_named_and_measured_again_once_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against figures of two states of the code that are mixed silently."""
    parts = [made_up(tmp_path, name, "pass") for name in ("first", "second")]
    for now, named, revisions in (
        (None, [], [None, None]),
        ("b", ["first", "second"], [None, None]),
        ("b", ["second"], ["b", None]),
        ("a", ["first", "second"], ["b", None]),
    ):
        monkeypatch.setattr(gpu_suite, "revision", lambda root, now=now: now)
        assert suite_of(tmp_path, parts).run() == 0
        entries = json.loads((tmp_path / "summary.json").read_text())["parts"]
        assert [entries[part.name]["revision"] for part in parts] == revisions
        printed = capsys.readouterr().out
        for part in parts:
            assert (f"== {part.name}: was measured at" in printed) == (part.name in named)
        if now == "b" and len(named) == 2:
            assert f"at an unknown revision, this is b; delete {parts[0].result} or give another" in printed
            parts[0].result.unlink()
            assert suite_of(tmp_path, parts).run() == 0
            assert "== first: was measured" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_overruns_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "OVERRUN_S", 0.1)
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"{child}; open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    part = made_up(tmp_path, "slow", code)
    assert suite_of(tmp_path, [part], 5).run() == 75
    assert states(tmp_path) == {"slow": "not finished"}
    pid = (tmp_path / "pid").read_text()

    def gone() -> bool:
        stat = Path("/proc", pid, "stat")
        return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    wait_until(gone, 10, "the end of the child")


def test_a_part_in_pieces_gets_the_time_that_is_left(tmp_path: Path) -> None:
    code = f"import os, sys; there = os.path.exists({str(tmp_path / 'first')!r}); "
    code += f"open({str(tmp_path / 'first')!r}, 'a').write(' '.join(sys.argv[1:])); there or sys.exit(75)"
    part = made_up(tmp_path, "pieces", code, resumable=True)
    assert suite_of(tmp_path, [part], 50).run() == 75
    assert re.fullmatch(r"--time_limit (49|50)", (tmp_path / "first").read_text())
    assert suite_of(tmp_path, [part]).run() == 0
    assert states(tmp_path) == {"pieces": "finished"}


def test_counts_of_tests_are_pytests(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2\n"
        "def test_c(): pytest.skip('no')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('gone')\n"
        "def test_d(broken): pass\n"
    )
    junit = tmp_path / "tests.xml"
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), f"--junitxml={junit}")
    part = Part("tests", "tests", (*words, str(tmp_path / "test_it.py")), 0, junit)
    assert suite_of(tmp_path, [part]).run() == 1
    counts = json.loads((tmp_path / "tests.json").read_text())
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 2, 1)
    assert [failure["test"].rsplit("::")[-1] for failure in counts["failures"]] == ["test_b", "test_d"]
    assert "assert 1 == 2" in counts["failures"][0]["message"]


def latency_result(path: str, batch_size: int, pixels: bool, median_ms: float, **more: Any) -> dict[str, Any]:
    rates = {"images_per_sec": 1000 * batch_size / median_ms, "weight_bytes_share": 0.25, "flops_share": None}
    return {
        "batch_size": batch_size, "path": path, "pixels": pixels, "warmup": 20, "runs": 50, "median_ms": median_ms,
        "peak_memory_gib": 3.21, **rates, **more,
    }  # fmt: skip


def write_suite(out: Path, **more: Any) -> None:
    """A folder as the suite leaves it, with made-up figures."""
    by_path = [
        latency_result(path, 1, pixels, median_ms)
        for path, median_ms in (("plain", 100.0), ("graph", 12.5))
        for pixels in (False, True)
    ]
    by_path[1] |= {"speed_up": 1.0}
    by_path[3] |= {"median_ms": 20.0, "speed_up": 5.0}
    by_path[2] |= {"graph_nodes": 2345}
    products = [
        {"product": "fc1", "rows": 12, "by": by, "weights": weights, "pdl": pdl, "us": us, "chosen": chosen,
         "columns": columns, "block": 128, "split": 1, "stages": 5}
        for by, weights, pdl, us, chosen, columns in (
            ("library", "bfloat16", False, 5.04, False, None), ("own", "bfloat16", True, 4.06, True, 32),
            ("own", "bfloat16", True, 3.52, False, 64), ("own", "bfloat16", False, 4.51, True, 32),
            ("own", "float8", True, 2.5, True, 32),
        )
    ]  # fmt: skip
    row = [latency_result("graph", 1, True, 20.0), latency_result("graph", 64, True, 200.0)]
    train = {
        "model": "lpd_l", "img_size": 256, "batch_size": 64, "dtype": "bfloat16 autocast",
        "rows": [
            {"name": "plain", "failed": "out of memory", "peak_memory_gib": 70.0},
            {"name": "fast", "images_per_sec": 512.0, "peak_share": 0.4, "median_sec_per_step": 0.125,
             "peak_memory_gib": 20.0},
        ],
    }  # fmt: skip
    drawing = [
        {"img_size": size, "steps": steps, "implementation": name, "orders_per_sec": rate}
        for size, steps in ((256, 20), (512, 48))
        for name, rate in (("NumPy, 1 thread", 1790.0), ("torch, a GPU", 1234567.0))
    ]
    evaluation = {
        "model": "lpd_l", "img_size": 256, "generation_steps": 20, "eval_bsz": 64, "extractor": "classifier-net",
        "random_extractor_weights": True, "images_per_sec_without_scores": 400.0, "images_per_sec_with_features": 300.0,
        "pixels_share_of_generating": 0.125, "scores_sec": 7.5, "scoring_share_of_50000_images": 0.25,
    }  # fmt: skip
    tests = {"passed": 16, "failed": 1, "skipped": 0, "seconds": 3.0, "failures": []}
    contents: dict[str, tuple[str, dict[str, Any]]] = {
        "tests": ("tests", tests),
        "latency_by_path": ("latency", {"results": by_path}),
        "latency_lpd_l_res256_steps20": ("latency", {"results": row}),
        "kernels": ("kernels", {}),
        "tiles": ("tiles", {"model": "lpd_l", "products": [*products, products[0] | {"rows": 78}]}),
        "train": ("train", train),
        "orders": ("orders", {"drawing": drawing}),
        "evaluation": ("evaluation", evaluation),
    }
    parts = {}
    for name, (group, content) in contents.items():
        write_json(out / f"{name}.json", content | {"output": str(out / f"{name}.json")})
        parts[name] = {
            "group": group, "command": f"python of {name}", "tiny": False, "quick": True, "date": "2026-01-02",
            "state": "failed" if name == "tests" else "finished", "seconds": 1.0, "result": f"{name}.json",
            "revision": REVISION,
            "error": None,
        }  # fmt: skip
    (out / "kernels").mkdir()
    (out / "kernels" / "graph.txt").write_text("attention 1 ms\n")
    write_json(out / "summary.json", GPU | {"parts": parts} | more)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A root with the project's README as it stands."""
    root = tmp_path / "repository"
    root.mkdir()
    shutil.copy(ROOT / "README.md", root)
    return root


def between(text: str, mark: str) -> str:
    return text.partition(f"<!-- gpu:{mark} -->\n")[2].partition(f"\n<!-- /gpu:{mark} -->")[0]


def test_publishing_fills_the_readme_and_does_so_again(tmp_path: Path, repository: Path) -> None:
    """Guards against marks lost from the README, and figures in the wrong column."""
    write_suite(tmp_path)
    gpu_tables.publish(tmp_path, "test", repository)
    text = (repository / "README.md").read_text()
    assert "run on a GPU yet" not in text
    measured = "latency, products of a step, orders, training, evaluation ([speed on a GPU](#speed-on-a-gpu))."
    tested = "GPU tests: 16 passed, 1 failed, 0 skipped."
    assert between(text, "status") == f"**Measured on one a GPU**: {measured} {tested}"
    paths = between(text, "paths").replace("\n", " ")
    assert "| `plain` | 100.0 ms | 100.0 ms | 1.0 | – | 3.2 GiB |" in paths
    assert "| `graph` | 12.5 ms | 20.0 ms | 5.0 | 2,345 | 3.2 GiB |" in paths
    assert "a GPU, driver 570.1, torch 2.11.0, triton 3.6.0, code of revision 0123456789, 2026-01-02, random" in paths
    assert "random weights, medians (batch 1: 50 runs after 20)" in paths
    assert "`python -m scripts.gpu_suite --output_dir DIR --quick`" in paths
    assert "[kernels of `graph`](benchmarks/results/kernels_test.txt)" in paths
    row = "| LPD-L, 256 px, 20 steps | 20.0 ms | 280 ms | 25% | – | 320.0 | 139.1 | – | 3.2 GiB |"
    assert row in between(text, "rows")
    tiles = between(text, "tiles")
    assert "| fc1, 12 rows | 5.0 | 4.1 | 3.5 (64×128, 1, 5) | 4.5 | 2.5 |" in tiles
    assert "| fc1, 78 rows | 5.0 | – | – | – | – |" in tiles
    train = between(text, "train")
    assert "| plain | out of memory | – | – | 70.0 GiB |" in train
    assert "| fast | 512 | 40% | 125 ms | 20.0 GiB |" in train
    assert "| torch, a GPU | 1,234,567/s | 1,234,567/s |" in between(text, "orders")
    evaluation = between(text, "evaluation")
    assert "| with features (classifier-net, random weights), images/s | 300.0 |" in evaluation
    assert "(extrapolated) | 25% |" in evaluation
    for mark in ("paths", "rows", "tiles", "train", "orders", "evaluation"):
        table = [line for line in between(text, mark).splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1
        assert set(table[1]) == {"|", "-"}
    results = {path.name for path in (repository / "benchmarks" / "results").iterdir()}
    groups = ("tests", "latency", "tiles", "orders", "train", "evaluation")
    assert results == {*(f"{group}_test.json" for group in groups), "kernels_test.txt"}
    latency = (repository / "benchmarks" / "results" / "latency_test.json").read_text()
    assert str(tmp_path) not in latency
    assert json.loads(latency)["parts"]["latency_by_path"]["result"]["results"][2]["graph_nodes"] == 2345

    gpu_tables.publish(tmp_path, "test", repository)
    assert (repository / "README.md").read_text() == text
    summary = json.loads((tmp_path / "summary.json").read_text())
    for part in ("latency_by_path", "latency_lpd_l_res256_steps20", "orders"):
        summary["parts"][part]["state"] = "failed"
    summary["parts"]["train"]["date"] = "2026-02-03"
    write_json(tmp_path / "summary.json", summary)
    gpu_tables.publish(tmp_path, "test", repository)
    again = (repository / "README.md").read_text()
    for mark in ("status", "paths", "rows", "orders"):
        assert between(again, mark) == between(text, mark)
    assert "2026-02-03" in between(again, "train")


@pytest.mark.parametrize(
    ("kept", "first"),
    [
        ({"tests"}, "**Nothing has been measured on a GPU yet**; tests have been run on one a GPU. GPU tests: 16"),
        ({"tests", "orders"}, "**Latency has not been measured on a GPU yet**; on one a GPU: orders. GPU tests: 16"),
        ({"orders", "train"}, "**Latency has not been measured on a GPU yet**; on one a GPU: orders, training."),
    ],
)
def test_without_latency_the_readme_does_not_say_measured(
    tmp_path: Path, repository: Path, kept: set[str], first: str
) -> None:
    write_suite(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["parts"] = {name: part for name, part in summary["parts"].items() if name in kept}
    write_json(tmp_path / "summary.json", summary)
    gpu_tables.publish(tmp_path, "test", repository)
    assert between((repository / "README.md").read_text(), "status").startswith(first)


def test_figures_of_two_revisions_are_published_as_such(tmp_path: Path, repository: Path) -> None:
    write_suite(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["parts"]["latency_by_path"]["revision"] = None
    summary["parts"]["latency_lpd_l_res256_steps20"]["revision"] = f"{REVISION}-dirty"
    summary["parts"]["latency_lpd_l_res256_steps32"] = summary["parts"]["latency_lpd_l_res256_steps20"] | {
        "revision": REVISION
    }
    write_json(tmp_path / "summary.json", summary)
    gpu_tables.publish(tmp_path, "test", repository)
    text = (repository / "README.md").read_text().replace("\n", " ")
    assert "code of revision unknown, 2026-01-02" in text
    assert "code of revision 0123456789 and 0123456789-dirty, 2026-01-02" in text


def test_what_means_nothing_is_not_published(tmp_path: Path, repository: Path) -> None:
    before = (repository / "README.md").read_text()
    with pytest.raises(UserError, match=r"has no summary\.json"):
        gpu_tables.publish(tmp_path, "test", repository)
    write_suite(tmp_path, device="CPU")
    with pytest.raises(UserError, match="of a CPU"):
        gpu_tables.publish(tmp_path, "test", repository)
    summary = json.loads((tmp_path / "summary.json").read_text()) | {"device": "a GPU"}
    summary["parts"]["orders"]["tiny"] = True
    write_json(tmp_path / "summary.json", summary)
    with pytest.raises(UserError, match="tiny models"):
        gpu_tables.publish(tmp_path, "test", repository)
    write_json(tmp_path / "summary.json", summary | {"parts": {}})
    with pytest.raises(UserError, match="nothing to publish"):
        gpu_tables.publish(tmp_path, "test", repository)
    assert (repository / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("summary.json", {"parts": [1]}), ("summary.json", {"device": None}), ("train.json", {"rows": 3}),
        ("latency_by_path.json", {"results": [{}]}), ("summary.json", None), ("train.json", None),
    ],
)  # fmt: skip
def test_damaged_results_are_named_and_nothing_is_published(
    tmp_path: Path, repository: Path, name: str, change: dict[str, Any] | None
) -> None:
    """Guards against results that are half published, and a suite that resumes from a damaged summary."""
    write_suite(tmp_path)
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    content = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text("{" if change is None else json.dumps(content | change))
    with pytest.raises(UserError, match=r"damaged"):
        gpu_tables.publish(tmp_path, "test", repository)
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    if name == "summary.json" and "device" not in (change or {}):
        with pytest.raises(UserError, match=r"summary\.json is truncated or damaged"):
            suite_of(tmp_path, [])


def test_the_readme_says_what_was_measured() -> None:
    """All marks are there once; a table without a published result says that there is none."""
    text = (ROOT / "README.md").read_text()
    for mark in ("status", "paths", "rows", "tiles", "train", "orders", "evaluation"):
        assert gpu_tables.fill(text, mark, between(text, mark)) == text
        assert re.search(r"yet\*\*|yet\.\*\*|has been tried|Measured on|\|---\|", between(text, mark))
    for broken in (text.replace("<!-- gpu:rows -->", ""), text + "<!-- gpu:rows -->", text + "<!-- /gpu:rows -->"):
        with pytest.raises(UserError, match="gpu:rows"):
            gpu_tables.fill(broken, "rows", "")


def test_bad_input_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        (("--time_limit", 0), "--time_limit is 0.0"),
        (("--parts", "tokens"), "--parts is 'tokens'"),
        (("--publish", "a b"), "--publish 'a b' must be letters"),
        (("--photos", tmp_path / "none.npz"), f"--photos {tmp_path / 'none.npz'} does not exist"),
        (("--publish", "h200", "--output_dir", tmp_path), "has no summary.json"),
    ):
        assert run(gpu_suite.main, *arguments) == 2
        assert named in capfd.readouterr().err


WITH_A_PART = """
import sys
from pathlib import Path
from scripts import gpu_suite
from tests.scripts.test_gpu_suite import made_up
from util.cli import exit_on_user_error
out = Path(sys.argv[2])
gpu_suite.Parts = lambda *_: lambda: [made_up(out, "part", (out / "code").read_text())]
exit_on_user_error(gpu_suite.main)
"""
SAVES = """
import os, pathlib, signal, sys, time
folder = pathlib.Path({!r})
def save(number, frame):
    time.sleep(3)
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "pid.new").write_text(str(os.getpid()))
(folder / "pid.new").rename(folder / "pid")
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_part_ends_with_the_suite_and_saves_if_it_can(tmp_path: Path, number: signal.Signals) -> None:
    """Guards against a part that goes on without its suite, and one that is killed while it saves."""
    (tmp_path / "code").write_text(SAVES.format(str(tmp_path)).strip())
    words = (sys.executable, "-c", WITH_A_PART, "--output_dir", tmp_path, "--device", "cpu")
    with subprocess.Popen(words, cwd=ROOT) as suite:
        wait_until((tmp_path / "pid").exists, 60, "the part")
        suite.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            suite.wait(0.5)
        suite.send_signal(number)  # `timeout` sends it twice
    wait_until(lambda: not Path("/proc", (tmp_path / "pid").read_text()).exists(), 20, "the end of the part")
    killed = number == signal.SIGKILL
    assert suite.returncode == (-signal.SIGKILL if killed else 75)
    assert (tmp_path / "saved").exists() != killed
    assert states(tmp_path) == {"part": "not finished"}


def test_a_second_suite_in_the_same_folder_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path):
        assert run(gpu_suite.main, "--output_dir", tmp_path, "--device", "cpu", "--parts", "orders") == 2
    assert capfd.readouterr().err.startswith(f"error: another process is writing to {tmp_path}")
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_all_of_it_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Every part that a CPU has, as the commands they are; then nothing is left to do, and nothing to publish."""
    monkeypatch.chdir(ROOT)
    assert run(gpu_suite.main, "--output_dir", tmp_path, "--device", "cpu") == 0
    assert "no GPU: tiny models" in capfd.readouterr().out
    assert states(tmp_path) == dict.fromkeys(
        ("latency_by_path", "kernels", "orders", "train", "evaluation"), "finished"
    )
    for part in json.loads((tmp_path / "summary.json").read_text())["parts"].values():
        assert json.loads((tmp_path / part["result"]).read_text())["environment"]["device_type"] == "cpu"
    written = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob("*.json")}
    assert run(gpu_suite.main, "--output_dir", tmp_path, "--device", "cpu") == 0
    assert capfd.readouterr().out.count("done before") == 5
    results = [path for path in written if path.name != "summary.json"]
    assert all(os.stat(path).st_mtime_ns == written[path] for path in results)
    assert run(gpu_suite.main, "--output_dir", tmp_path, "--publish", "cpu") == 2
