"""Tokenizer files: written and read back, and refused with one clear sentence."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pytest
import torch

from tokenizers import VQConfig, VQModel, load_tokenizer, log_quality, save_tokenizer
from tokenizers import checkpoint as checkpoint_module
from util.errors import UserError

CONFIG = VQConfig(base_width=8, multipliers=(1, 2), res_blocks=1, z_channels=8, codebook_size=32, code_dim=4)


@pytest.fixture
def model() -> VQModel:
    torch.manual_seed(0)
    return VQModel(CONFIG).eval()


@pytest.mark.parametrize("name", ["tokenizer.pt", "folder/tokenizer.safetensors"])
def test_saved_and_loaded_tokenizers_are_equal(model: VQModel, tmp_path: Path, name: str) -> None:
    """Guards against a lost config, a parameter left on the meta device, or a trainable loaded model."""
    save_tokenizer(model, tmp_path / name)
    loaded = load_tokenizer(tmp_path / name)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert loaded.config == CONFIG
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert torch.equal(loaded.decode(model.encode(images)), model.decode(model.encode(images)))


@pytest.mark.parametrize("container", ["bare", "model", "with arguments"])
def test_files_without_a_config_are_of_the_released_size(
    model: VQModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    """Guards against refusing the released file: its state dict bare or under ``model``, maybe with a Namespace."""
    monkeypatch.setattr(checkpoint_module, "VQConfig", lambda: CONFIG)
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    content = {
        "bare": half,
        "model": {"model": half},
        "with arguments": {"model": half, "args": argparse.Namespace(a=1)},
    }
    torch.save(content[container], tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt")
    assert loaded.quantize.embedding.weight.dtype == torch.float32
    assert torch.equal(loaded.quantize.embedding.weight.half(), half["quantize.embedding.weight"])


def test_a_missing_file_says_where_the_released_one_comes_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt.*vq_ds16_c2i\.pt of .*FoundationVision/LlamaGen"):
        load_tokenizer(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("name", ["t.pt", "t.safetensors"])
@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_truncated_file_is_refused(model: VQModel, tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / name
    save_tokenizer(model, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"{name}.*damaged"):
        load_tokenizer(path)


class _Payload:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Payload()}, "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt"):
        load_tokenizer("evil.pt")
    assert not Path("executed").exists()


def test_missing_extra_and_misshapen_parameters_are_named(model: VQModel, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"

    def save(change: dict, drop: str = "") -> None:
        state = {**model.state_dict(), **change}
        state.pop(drop, None)
        torch.save({"model": state, "config": {**vars(CONFIG)}}, path)

    save({}, drop="quant_conv.bias")
    with pytest.raises(UserError, match=r"t\.pt.*quant_conv\.bias is missing"):
        load_tokenizer(path)
    save({"surprise": torch.zeros(1)})
    with pytest.raises(UserError, match="surprise is unknown"):
        load_tokenizer(path)
    save({"quant_conv.bias": torch.zeros(5)})
    with pytest.raises(UserError, match=r"quant_conv\.bias has shape \(5,\) and should have \(4,\)"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"model": {}}, {"model": {"a": 1}}, {"model": {"a": torch.ones(1)}, "config": {"width": 3}}]
)
def test_other_contents_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "t.pt")
    with pytest.raises(UserError, match=r"t\.pt"):
        load_tokenizer(tmp_path / "t.pt")


def test_an_interrupted_save_keeps_the_old_file(
    model: VQModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.pt"
    save_tokenizer(model, path)
    before = path.read_bytes()

    def broken_save(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module.torch, "save", broken_save)
    with pytest.raises(KeyboardInterrupt):
        save_tokenizer(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["t.pt", "t.safetensors"])
def test_a_file_says_what_its_reconstructions_are_worth(
    model: VQModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO)
    judged = {"class_accuracy_real": 0.664, "class_accuracy_reconstructed": 0.446}
    for quality in ({"psnr_db": 20.74, "ssim": 0.6}, {"psnr_db": 20.74, "ssim": 0.6, **judged}):
        save_tokenizer(model, tmp_path / name, quality)
        assert load_tokenizer(tmp_path / name).config == CONFIG
        log_quality(tmp_path / name)
    line = "tokenizer: PSNR 20.7 dB, SSIM 0.60 on held-out pictures"
    assert caplog.messages == [
        line, f"{line}; its reconstructions are read right 44.6% of the time, the pictures 66.4%"
    ]  # fmt: skip


def test_a_file_that_does_not_say_its_worth_is_passed_over(
    model: VQModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the released file, of an earlier version, odd or damaged: whether it can be used is another function's."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "t.pt"
    for content in (
        model.state_dict(),
        {"model": model.state_dict(), "quality": {}},
        {"model": model.state_dict(), "quality": [1]},
        {"model": model.state_dict(), "quality": {"psnr_db": "high", "ssim": 1}},
    ):
        torch.save(content, path)
        log_quality(path)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    log_quality(path)
    path.write_bytes(b"half")
    log_quality(path)
    save_tokenizer(model, tmp_path / "t.safetensors")
    log_quality(tmp_path / "t.safetensors")
    log_quality(tmp_path / "nowhere.pt")
    assert caplog.messages == []
