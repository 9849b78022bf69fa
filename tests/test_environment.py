"""environment_setup.sh with a lock of one tiny package, made here, so that nothing is downloaded."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

SCRIPT = ROOT / "environment_setup.sh"


def _wheel(folder: Path, version: str) -> str:
    """Write a wheel of the package ``tiny`` and return its file name."""
    name = f"tiny-{version}-py3-none-any.whl"
    info = f"tiny-{version}.dist-info"
    files = {
        "tiny.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record += f"{path},sha256={digest},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return name


def _run(folder: Path, *args: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("CONDA_EXE", "VIRTUAL_ENV")}
    environment |= {"PATH": path or f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
    return subprocess.run(
        ["/bin/bash", "environment_setup.sh", *args], cwd=folder, env=environment, capture_output=True, text=True
    )


def _version(folder: Path) -> str:
    python = folder / ".venv/bin/python"
    return subprocess.run(
        [python, "-c", "import tiny; print(tiny.VERSION)"], capture_output=True, text=True, check=True, cwd="/"
    ).stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script, a lock of one package, and the .venv that a first run made."""
    folder = tmp_path_factory.mktemp("a checkout")  # a path with a space
    shutil.copy(SCRIPT, folder)
    (folder / "requirements.lock").write_text(f"./{_wheel(folder, '1.0')}\n")
    result = _run(folder)
    assert result.returncode == 0, result.stderr
    assert "source .venv/bin/activate" in result.stdout
    return folder


@pytest.mark.slow
def test_second_run_does_nothing_and_a_new_lock_is_followed(checkout: Path) -> None:
    """Guards against a second run that installs again, and a stamp that hides a changed lock."""
    assert _version(checkout) == "1.0"
    again = _run(checkout)
    assert again.returncode == 0
    assert "up to date" in again.stdout
    assert "installing" not in again.stdout
    (checkout / "requirements.lock").write_text(f"./{_wheel(checkout, '2.0')}\n")
    assert _run(checkout).returncode == 0
    assert _version(checkout) == "2.0"


@pytest.mark.slow
def test_cut_off_installation_is_mended(checkout: Path) -> None:
    """Guards against pip taking a half-unpacked package for an installed one."""
    (package,) = checkout.glob(".venv/lib/python*/site-packages/tiny.py")
    (information,) = package.parent.glob("tiny-*.dist-info")
    package.write_text("")
    (information / "INSTALLER").unlink()
    (information / "RECORD").unlink()
    (checkout / ".venv/lpd_environment.stamp").unlink()
    assert _run(checkout).returncode == 0
    assert _version(checkout)


@pytest.mark.slow
def test_moved_environment_is_made_anew(checkout: Path, tmp_path: Path) -> None:
    """Guards against an activate that leads to the old place, and a link to an environment being taken for a move."""
    moved, linked = tmp_path / "moved", tmp_path / "linked"
    shutil.copytree(checkout, moved, symlinks=True)
    linked.symlink_to(checkout)
    first, second = _run(moved), _run(moved)
    assert first.returncode == 0, first.stderr
    assert f"making .venv anew: it was made as {checkout}/.venv" in first.stdout
    assert "up to date" in second.stdout
    script = "source .venv/bin/activate; command -v python; pip --version"
    active = subprocess.run(["/bin/bash", "-c", script], cwd=moved, capture_output=True, text=True, check=True).stdout
    assert active.startswith(f"{moved}/.venv/bin/python\n")
    assert str(checkout) not in active
    assert _version(moved) == _version(checkout)
    assert "up to date" in _run(linked).stdout


@pytest.mark.slow
def test_failed_installation_says_so_and_leaves_no_stamp(checkout: Path) -> None:
    """Guards against an environment that counts as complete although a package could not be had."""
    lock = checkout / "requirements.lock"
    before = lock.read_text()
    lock.write_text("no-such-package==1.0\n")
    result = _run(checkout)
    lock.write_text(before)
    assert result.returncode == 1
    assert "no-such-package" in result.stderr
    assert "could not be installed" in result.stderr.splitlines()[-1]
    assert not (checkout / ".venv/lpd_environment.stamp").exists()


@pytest.mark.slow
def test_conda_environment_is_made_and_used(checkout: Path, tmp_path: Path) -> None:
    """Guards against a NAME that is ignored although conda is there; conda is played by a stand-in."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    envs = tmp_path / "envs"
    (bin_folder / "conda").write_text(
        f"""#!/bin/bash
        case "$1" in
            env) echo "base  /opt"; [[ -d {envs}/lpd ]] && echo "lpd  {envs}/lpd"; exit 0 ;;
            create) mkdir -p {envs} && ln -s "{checkout}/.venv" {envs}/lpd ;;
            run) shift 3; exec {envs}/lpd/bin/"$@" ;;
        esac
        """
    )
    (bin_folder / "conda").chmod(0o755)
    path = f"{bin_folder}:{os.environ['PATH']}"
    (checkout / ".venv/lpd_environment.stamp").unlink(missing_ok=True)
    first, second = _run(checkout, "lpd", path=path), _run(checkout, "lpd", path=path)
    assert first.returncode == 0, first.stderr
    assert "making the conda environment 'lpd'" in first.stdout
    assert "conda activate lpd" in first.stdout
    assert "up to date; activate it by: conda activate lpd" in second.stdout


@pytest.mark.slow
def test_without_conda_a_name_means_venv(checkout: Path) -> None:
    """Guards against the published command failing on a machine that has no conda."""
    result = _run(checkout, "lpd", path=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    assert "conda is not installed" in result.stdout


@pytest.mark.parametrize(
    ("python", "sentence"),
    [
        ("exit 1", "no Python 3.11, 3.12 or 3.13 found"),
        (
            '[[ "$2" != *venv* ]] || exit 1; [[ "$2" == *print* ]] && echo python3.12; exit 0',
            "apt install python3.12-venv",
        ),
    ],
)
def test_unfit_python_gets_one_sentence(tmp_path: Path, python: str, sentence: str) -> None:
    """Guards against a traceback of Debian's split venv module, or a long run with an unsupported Python."""
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "requirements.lock").write_text("")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for version in ("", ".11", ".12", ".13"):
        program = bin_folder / f"python3{version}"
        program.write_text(f"#!/bin/bash\n{python}\n")
        program.chmod(0o755)
    for tool in ("dirname", "awk", "grep", "cat"):
        (bin_folder / tool).symlink_to(shutil.which(tool) or tool)
    result = _run(tmp_path, path=str(bin_folder))
    assert result.returncode == 1
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_wrong_arguments_show_the_usage() -> None:
    """Guards against a flag being taken for the name of an environment."""
    result = _run(SCRIPT.parent, "--help")
    assert result.returncode == 2
    assert "usage:" in result.stderr
