"""``python -m scripts.edit``: what it writes for each way to say what is new, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from engine.image_generator import ImageGenerator
from scripts.edit import main
from tests.helpers.commands import run
from tests.helpers.tiny_generator import write_model

GRID = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a picture that is wider than the model's, a mask of it, and small ones of either."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "cat.png")
    mask = np.zeros((48, 96), np.uint8)
    mask[16:32, 32:64] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:20]).save(folder / "low.png")
    Image.fromarray(mask * 0).save(folder / "black.png")
    np.save(folder / "odd.npy", np.zeros(35, np.int64))
    np.save(folder / "high.npy", np.full(36, 12))
    return folder


def flags(folder: Path, out: Path, *more: object) -> list[object]:
    model = ["--pretrained_ckpt", folder / "model.pth", "--vqgan_path", folder / "tokenizer.pt", "--device", "cpu"]
    picture = [] if "--codes" in more else ["--image", folder / "cat.png"]
    return [*model, *picture, "--output_dir", out, *more]


def edit(folder: Path, out: Path, *more: object) -> dict[str, Any]:
    assert run(main, *flags(folder, out, *more)) == 0
    return json.loads((out / "edit.json").read_text())


def test_results_codes_and_strip(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hole is that of the mask's middle; outside of it the codes are the picture's."""
    out = tmp_path / "out"
    record = edit(folder, out, "--mask", folder / "mask.png", "--class", "birch", "--variants", 3)
    assert json.loads(capsys.readouterr().out) == record
    names = {f"00000{i}-birch{suffix}" for i in range(3) for suffix in (".png", ".npy")}
    assert {path.name for path in out.iterdir()} == names | {"strip.png", "edit.json"}
    generator = ImageGenerator(folder / "model.pth", folder / "tokenizer.pt", device="cpu")
    before = generator.encode(Image.open(folder / "cat.png")).view(GRID, GRID)
    known = np.ones((GRID, GRID), bool)
    known[2:4, 1:5] = False
    assert record["generated_tokens"] == (~known).sum()
    for made in record["pictures"]:
        codes = np.load(out / made["codes"])
        assert codes.shape == (GRID, GRID)
        assert (codes[known] == before.numpy()[known]).all()
        pixels = generator.decode_pixels(torch.from_numpy(codes).view(1, -1))[0]
        assert (np.asarray(Image.open(out / made["file"])).astype(int) - pixels).max() <= 1


def test_known_pixels_stay_where_asked(folder: Path, tmp_path: Path) -> None:
    edit(folder, tmp_path, "--box", "40,8,72,40", "--class", 1, "--feather", 2)
    generator = ImageGenerator(folder / "model.pth", folder / "tokenizer.pt", device="cpu")
    before = np.asarray(generator.crop(Image.open(folder / "cat.png")))
    after = np.asarray(Image.open(tmp_path / "000000-birch.png"))
    new = np.zeros((24, 24), bool)
    new[4:20, 8:24] = True
    assert (after[~new] == before[~new]).all()
    assert (after[new] != before[new]).any()


def test_a_canvas_fades_from_the_pixels_at_the_pictures_border(folder: Path, tmp_path: Path) -> None:
    edit(folder, tmp_path, "--outpaint", "2x1", "--class", 1, "--feather", 4)
    generator = ImageGenerator(folder / "model.pth", folder / "tokenizer.pt", device="cpu")
    before = np.asarray(generator.crop(Image.open(folder / "cat.png"))).astype(int)
    after = np.asarray(Image.open(tmp_path / "000000-birch.png")).astype(int)
    new = generator.decode_pixels(torch.from_numpy(np.load(tmp_path / "000000-birch.npy"))[None])[0]
    assert (after[:, 12:36] == before).all()
    for outside, inside in ((11, 12), (36, 35)):
        assert np.abs(after[:, outside] - (0.8 * after[:, inside] + 0.2 * new[:, outside])).max() <= 1


def test_pictures_and_masks_are_turned_as_a_camera_has_noted(folder: Path, tmp_path: Path) -> None:
    for name in ("cat", "mask"):
        with Image.open(folder / f"{name}.png") as picture:
            turned = picture.transpose(Image.Transpose.ROTATE_90)
            exif = turned.getexif()
            exif[ExifTags.Base.Orientation] = 6
            turned.save(tmp_path / f"{name}.png", exif=exif)
    edit(folder, tmp_path / "upright", "--mask", folder / "mask.png", "--class", 1)
    edit(folder, tmp_path / "turned", "--mask", tmp_path / "mask.png", "--class", 1, "--image", tmp_path / "cat.png")
    upright, turned = (np.load(tmp_path / way / "000000-birch.npy") for way in ("upright", "turned"))
    assert (upright == turned).all()


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        (("--box", "40,8,72,40", "--outside"), 36 - 16),
        (("--polygon", "24,0", "71,0", "24,47"), 21),
        (("--keep", "random:0.25"), 27),
        (("--keep", "centre:0.25"), 27),
        (("--outpaint", "2x1"), 36),
        (("--outpaint", "1.5x1.5", "--feather", 4), 45),
    ],
)
def test_every_way_to_say_what_is_new(folder: Path, tmp_path: Path, more: tuple[object, ...], tokens: int) -> None:
    """Also without a class, which nothing guides."""
    record = edit(folder, tmp_path, *more)
    assert record["generated_tokens"] == tokens
    assert record["settings"]["cfg"] == 1.0
    codes = np.load(tmp_path / "000000-no_class.npy")
    assert codes.size == record["tokens"] == (36 if "--outpaint" not in more else 36 + tokens)
    height, width = (4 * side for side in codes.shape)
    assert Image.open(tmp_path / "000000-no_class.png").size == (width, height)


def test_codes_of_an_edit_are_edited_further(folder: Path, tmp_path: Path) -> None:
    edit(folder, tmp_path / "first", "--box", "24,0,48,48", "--class", 1)
    codes = tmp_path / "first" / "000000-birch.npy"
    record = edit(folder, tmp_path / "second", "--codes", codes, "--box", "12,0,24,24", "--class", 2)
    first, second = (np.load(tmp_path / name) for name in ("first/000000-birch.npy", "second/000000-cedar.npy"))
    assert (first[:, :3] == second[:, :3]).all()
    assert record["generated_tokens"] == 18


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--mask", "low.png"), "the mask has 96×20 pixels, but the picture 96×48"),
        (("--mask", "black.png"), "nothing is masked within the middle of the picture"),
        (("--mask", "none.png"), "none.png"),
        (("--box", "0,0,20,48"), "nothing is masked within the middle"),
        (("--keep", "random:1"), "nothing is masked"),
        (("--box", "0,0,20"), "'0,0,20' must be left,top,right,bottom"),
        (("--polygon", "1,1", "2,2"), "three corners or more, got 2"),
        (("--keep", "left:0.3"), "'left:0.3' must begin with random: or centre:"),
        (("--keep", "random:1.5"), "the share to keep is 1.5"),
        (("--outpaint", "2"), "'2' must be columns and rows in pictures"),
        (("--outpaint", "0.5x1"), "must be at least one each way"),
        ((), "by one of --mask, --box, --polygon, --keep and --outpaint; none is given"),
        (("--box", "0,0,9,9", "--keep", "random:1"), "not --box and --keep together"),
        (("--mask", "mask.png", "--outside"), "--outside needs --box"),
        (("--mask", "mask.png", "--class", "fir"), "no class 'fir'; it has ash"),
        (("--mask", "mask.png", "--feather", "-1"), "--feather is -1"),
        (
            ("--mask", "mask.png", "--codes", "odd.npy"),
            "holds int64 (35,); a picture of this model is 36",
        ),
        (("--mask", "mask.png", "--codes", "high.npy"), "whole numbers from 0 to 11"),
        (("--mask", "mask.png", "--codes", "cat.png"), "file of codes"),
        (("--mask", "mask.png", "--codes", "odd.npy", "--image", "cat.png"), "either --image or --codes"),
    ],
)
def test_mistakes_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: tuple[object, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert run(main, *flags(folder, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_picture_that_is_too_small(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = folder / "small.png"
    Image.new("RGB", (23, 40)).save(small)
    assert run(main, *flags(folder, tmp_path, "--box", "0,0,9,9", "--image", small)) == 2  # the last of a flag wins
    assert "the picture has 23×40 pixels, fewer than the model's 24×24" in capsys.readouterr().err
