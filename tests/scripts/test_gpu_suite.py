"""The suite for a GPU: its parts, time limits and failures with parts made up here; all of it, tiny."""

from __future__ import annotations

import json
import os
import re
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
from scripts import gpu_suite
from scripts.benchmark_evaluation import EvaluationBenchmark
from scripts.benchmark_latency import LatencyBenchmark
from scripts.benchmark_orders import OrdersBenchmark
from scripts.benchmark_train import TrainBenchmark
from scripts.gpu_suite import Part, Parts, Suite, SuiteConfig
from scripts.tune_kernels import TuneConfig
from tests.helpers.commands import ROOT, run
from tests.helpers.gpu_results import GPU
from tests.helpers.processes import holder
from tests.helpers.slurm_cluster import wait_until
from util.cli import Parser, from_args
from util.errors import UserError

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
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])"
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
import os, pathlib, signal, sys
folder = pathlib.Path({!r})
def save(number, frame):
    (folder / "go_on").read_bytes()
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "pid.new").write_text(str(os.getpid()))
(folder / "pid.new").rename(folder / "pid")
while True:
    signal.pause()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_part_ends_with_the_suite_and_saves_if_it_can(tmp_path: Path, number: signal.Signals) -> None:
    """Guards against a part that goes on without its suite, and one that is killed while it saves."""
    (tmp_path / "code").write_text(SAVES.format(str(tmp_path)).strip())
    os.mkfifo(tmp_path / "go_on")
    killed = number == signal.SIGKILL
    words = (sys.executable, "-c", WITH_A_PART, "--output_dir", tmp_path, "--device", "cpu")
    with subprocess.Popen(words, cwd=ROOT) as suite:
        wait_until((tmp_path / "pid").exists, 60, "the part")
        suite.send_signal(number)
        if not killed:
            with open(tmp_path / "go_on", "wb"):  # once the part has begun to save
                suite.send_signal(number)  # `timeout` sends it twice
    wait_until(lambda: not Path("/proc", (tmp_path / "pid").read_text()).exists(), 20, "the end of the part")
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
