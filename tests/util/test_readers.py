"""Files from outside: whatever is in them, one sentence, and no more memory than they are large."""

from __future__ import annotations

import io
import json
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from util.errors import UserError
from util.logger import MetricsWriter
from util.readers import load_arrays, map_array, read_json, read_json_lines, stored_array


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 200_000, b"1" * 5000, b"<html>"])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    """Guards against RecursionError, UnicodeDecodeError and the other ways in which JSON fails."""
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^record .*a\.json is truncated or damaged"):
        read_json("record", tmp_path / "a.json")


def test_files_that_would_fill_the_memory_or_never_end_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="more than 128 MiB"):
        read_json("record", tmp_path / "large.json")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "", "/dev/zero"):
        with pytest.raises(UserError, match="is not a file"):
            read_json("record", tmp_path / name)
        with pytest.raises(UserError, match="is not a file"):
            load_arrays("part", tmp_path / name, ("x",))
        with pytest.raises(UserError, match="is not a file"):
            map_array("part", tmp_path / name, (1,), np.uint8)


def test_damaged_lines_are_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a run that can't go on because of its log, and against lines that are lost."""
    path = tmp_path / "metrics.jsonl"
    bad = [b'{"step": "2"}', b"[1]", b'{"st\xffep": 2}', b"{", b"[" * 20_000]
    good = [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    lines = [json.dumps(good[0]).encode(), *bad, json.dumps(good[1]).encode()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert read_json_lines(path, "step") == good
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]
    writer = MetricsWriter(path, resume_step=2)
    writer.write(step=4)
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [good[0], {"step": 4}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().splitlines() == bad
    assert caplog.text.count("is damaged and left out") == 2 * len(bad)
    with caplog.at_level(logging.WARNING):
        assert read_json_lines(tmp_path / "none.jsonl") == []


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6).reshape(2, 3), "text": np.array("é"), "none": np.empty((0, 4), np.float32)}
    for number, save in enumerate((np.savez, np.savez_compressed)):
        save(tmp_path / f"{number}.npz", **arrays)  # type: ignore[arg-type]
        read = load_arrays("part", tmp_path / f"{number}.npz", ("x", "none"), ("text", "more"))
        assert sorted(read) == ["none", "text", "x"]
        for name, array in read.items():
            assert array.dtype == arrays[name].dtype
            assert np.array_equal(array, arrays[name])
        assert stored_array("part", tmp_path / f"{number}.npz", "x") == ((2, 3), np.dtype(np.int64))
        assert stored_array("part", tmp_path / f"{number}.npz", "more") is None
    with pytest.raises(UserError, match=r"part .*0\.npz has no array 'y'; it holds x, text, none"):
        load_arrays("part", tmp_path / "0.npz", ("y",))


def test_claims_of_terabytes_and_objects_are_refused(tmp_path: Path) -> None:
    """Guards against memory that is taken because a header says so, and against pickles."""
    header = io.BytesIO()
    shape = (2**20, 2**20)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    for content in (header.getvalue() + bytes(64), _npy(np.array([{}], object)), b"\x93NUMPY\x01"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("x.npy", content)
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npz is truncated or damaged"):
            load_arrays("part", tmp_path / "a.npz", ("x",))
        with pytest.raises(UserError, match=r"a\.npy is truncated or damaged"):
            map_array("part", tmp_path / "a.npy", shape, np.float64)
