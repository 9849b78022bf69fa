"""Checkpoints: complete or not there, released files loadable, nothing executed, the newest readable one found."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from models import build_model
from models.lpd import load_weights
from util.checkpoint import find_checkpoints, load_checkpoint, load_newest, save_checkpoint, save_safetensors
from util.errors import UserError
from util.files import atomic_write

OPTIONS = {"img_size": 64, "class_num": 3, "vocab_size": 5}


def test_round_trip_and_readable_metadata(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-last.pth"
    save_checkpoint(path, {"model": {"a": torch.ones(2)}, "optimizer": {}, "epoch": 3, "config": {"depth": 2}})
    assert torch.equal(load_checkpoint(path)["model"]["a"], torch.ones(2))
    assert json.loads(path.with_suffix(".json").read_text()) == {"epoch": 3, "config": {"depth": 2}}


def test_released_layout_with_a_namespace_loads(tmp_path: Path) -> None:
    """The published files carry an argparse.Namespace, which a plain weights-only load refuses."""
    model, path = build_model("lpd_debug", **OPTIONS), tmp_path / "released.pth"
    torch.save({"model": model.state_dict(), "epoch": 449, "args": argparse.Namespace(lr=1e-4, cfg=4.8)}, path)
    payload = load_checkpoint(path)
    assert payload["args"].cfg == 4.8
    load_weights(build_model("lpd_debug", **OPTIONS), payload["model"], "released.pth")


def test_bare_state_dict_and_safetensors_load(tmp_path: Path) -> None:
    state = build_model("lpd_debug", **OPTIONS).state_dict()
    torch.save(state, tmp_path / "bare.pth")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for name in ("bare.pth", "model.safetensors"):
        loaded = load_checkpoint(tmp_path / name)["model"]
        assert all(torch.equal(value, loaded[key]) for key, value in state.items())


class Exploit:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_safetensors_of_the_same_content_are_the_same_file(tmp_path: Path) -> None:
    """Guards against a SHA-256 that is another after each export: the library writes metadata in any order."""
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {f"key{number}": f'{{"größe": {number}}}' for number in range(8)}
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        save_safetensors(path, tensors, metadata)
    assert len({path.read_bytes() for path in paths}) == 1
    with safetensors.safe_open(paths[0], framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {}, "args": Exploit()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Exploit()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated_file_is_one_sentence(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.pth"
    save_checkpoint(path, {"model": build_model("lpd_debug", **OPTIONS).state_dict()})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.pth .*damaged") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        load_checkpoint(tmp_path / "cut.safetensors")


def test_other_content_is_refused(tmp_path: Path) -> None:
    for content, named in (([1, 2], "list"), ({"epoch": 3}, "no state dict"), ({"model": 1}, "no state dict")):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=named):
            load_checkpoint(tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "missing.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """They would be evaluated, exported and trained further, with noise as the result."""
    good = {"a": torch.ones(5).to(dtype), "empty": torch.ones(0), "count": torch.ones(2, dtype=torch.int64)}
    bad = good | {"a": torch.tensor([1, 2, value]).to(dtype)}
    save_checkpoint(tmp_path / "good.pth", {"model": good, "model_ema": good})
    load_checkpoint(tmp_path / "good.pth")
    for content, key in (({"model": bad}, "model"), ({"model": good, "model_ema": bad}, "model_ema"), (bad, "model")):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=rf"bad\.pth .*not finite: a under '{key}'"):
            load_checkpoint(tmp_path / "bad.pth")
    safetensors.torch.save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load_checkpoint(tmp_path / "bad.safetensors")


def test_newest_readable_checkpoint_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_newest(tmp_path) is None
    for epoch in (2, 10, 9):
        save_checkpoint(tmp_path / f"checkpoint-{epoch}.pth", {"model": {"a": torch.ones(1)}, "epoch": epoch})
    (tmp_path / "checkpoint-last.pth").write_bytes(b"half")
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["checkpoint-last.pth", "checkpoint-10.pth", "checkpoint-9.pth", "checkpoint-2.pth"]
    found = load_newest(tmp_path)
    assert found is not None
    assert found[1]["epoch"] == 10
    assert "checkpoint-last.pth" in caplog.text
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 4"):
        load_newest(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    """A full disk or a kill in the middle of a save must not cost the checkpoint that was there."""
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail_half_way()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_weights_of_another_grid_are_resized_and_other_sizes_named() -> None:
    small = build_model("lpd_debug", **OPTIONS)
    large = build_model("lpd_debug", **(OPTIONS | {"img_size": 128}))
    with pytest.raises(UserError, match="another size: pos_embed"):
        load_weights(large, small.state_dict(), "small.pth")
    load_weights(large, small.state_dict(), "small.pth", resize=True)
    assert torch.equal(large.pos_embed[:, :1], small.pos_embed[:, :1])
    for change, named in (
        ({"class_num": 4}, "class_emb.weight is"),
        ({"embed_dim": 64}, "another size"),
        ({"depth": 3}, "blocks.2.* is missing"),
        ({"depth": 1}, "blocks.1.* is unknown"),
    ):
        with pytest.raises(UserError, match=named):
            load_weights(build_model("lpd_debug", **(OPTIONS | change)), small.state_dict(), "small.pth", resize=True)


def test_a_flipped_byte_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torch.load compares no check sums: a run would resume from altered weights."""
    for name, step in (("checkpoint-last.pth", 2), ("checkpoint-last-1.pth", 1)):
        save_checkpoint(tmp_path / name, {"model": {"a": torch.ones(4096)}, "step": step})
    content = bytearray((tmp_path / "checkpoint-last.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "checkpoint-last.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint-last\.pth is truncated or damaged .*check sum"):
        load_checkpoint(tmp_path / "checkpoint-last.pth")
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest[1]["step"] == 1
    assert "skipped" in caplog.text
