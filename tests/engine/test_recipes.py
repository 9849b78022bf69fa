"""The published runs: every recipe builds the published network, every script starts and says what it lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main_lpd
from engine.config import Config
from engine.decoding.latency import PUBLISHED_RUNS
from engine.hub.download import DOWNLOADS, ORDERS_DIR
from engine.options import parse, recipe_changes
from engine.recipes import EVAL_RECIPES, RELEASED, TOKENIZER, TRAIN_RECIPES, checkpoint_path
from models import MODEL_SIZES
from models.lpd import LPD
from orders import group_sizes
from tests.helpers.commands import ROOT
from util.cli import exit_on_user_error
from util.config import record

RELEASED_L_256 = json.loads((ROOT / "tests" / "data" / "lpd_l_256.keys.json").read_text())
WIDTH, DEPTH, GRID = 1024, 24, 16


def expected_shapes(embed_dim: int, depth: int, grid: int) -> dict[str, list[int]]:
    """Names and shapes of a released size, from those of the released lpd_l_256."""
    shapes = {}
    for name, shape in RELEASED_L_256.items():
        scaled = [size * embed_dim // WIDTH if size % WIDTH == 0 and size != 16384 else size for size in shape]
        if name == "pos_embed":
            scaled[1] = grid**2 + 1
        copies = range(depth) if name.startswith("blocks.0.") else [None]
        if name.startswith("blocks.") and not name.startswith("blocks.0."):
            continue
        for block in copies:
            shapes[name if block is None else name.replace("blocks.0.", f"blocks.{block}.")] = scaled
    return shapes


def test_scaled_shapes_of_the_released_model_are_its_own() -> None:
    assert expected_shapes(WIDTH, DEPTH, GRID) == RELEASED_L_256


@pytest.mark.parametrize("name", [*EVAL_RECIPES, *TRAIN_RECIPES])
def test_recipe_builds_the_released_network(name: str) -> None:
    """Weights that do not load would show after the download of gigabytes, or after a training of weeks."""
    evaluate = ["--evaluate"] if name in EVAL_RECIPES else []
    parsed = parse([*evaluate, "--recipe", name])
    args = flags_of(parsed)
    config = parsed.model.resolve(None, stride=16, vocab_size=16384)
    with torch.device("meta"):
        state = LPD(config).state_dict()
    embed_dim, depth, heads = MODEL_SIZES[args.model]
    shapes = {key: list(value.shape) for key, value in state.items()}
    assert shapes == expected_shapes(embed_dim, depth, args.img_size // 16)
    assert config.num_heads == heads == embed_dim // 64
    assert sum(group_sizes(config.img_size, args.generation_steps)) == config.num_tokens
    assert args.speed_runs == (PUBLISHED_RUNS if evaluate else 0)


def flags_of(config: Config) -> SimpleNamespace:
    """The settings of all parts, flat, as a command line has them."""
    return SimpleNamespace(**record(config))


def test_every_file_that_recipes_need_can_be_downloaded() -> None:
    places = {str(entry.place) for entry in DOWNLOADS.values()}
    assert places == {checkpoint_path(*released) for released in RELEASED} | {TOKENIZER}
    for recipe in (*EVAL_RECIPES.values(), *TRAIN_RECIPES.values()):
        assert {recipe[key] for key in ("pretrained_ckpt", "vqgan_path") if key in recipe} <= places


def test_changes_of_a_recipe_are_recorded() -> None:
    """A run with other guidance must not pass for the published one; where the files lie changes nothing."""
    recipe = ["--evaluate", "--recipe", "lpd_l_res256_steps20"]
    assert recipe_changes(parse([*recipe, "--output_dir", "x", "--eval_bsz", "7", "--vqgan_path", "y.pt"])) == {}
    changed = recipe_changes(parse([*recipe, "--cfg", "3", "--num_images", "100", "--no-bf16"]))
    assert changed == {"cfg": 3.0, "num_images": 100, "bf16": False}
    json.dumps(record(parse(recipe)))


def arguments_of(script: Path, tmp_path: Path) -> list[str]:
    """The command line that a script ends in, found by running it with a `python` that only writes it down."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$ARGUMENTS"\n')
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}", "NPROC_PER_NODE": "1"}
    environment["ARGUMENTS"] = str(tmp_path / "arguments")
    subprocess.run(["bash", str(script), "--device", "cpu"], env=environment, check=True)
    return (tmp_path / "arguments").read_text().splitlines()


def error_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What main_lpd.py says in an empty folder, when it ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["main_lpd.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(main_lpd.main)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", EVAL_RECIPES)
def test_evaluation_scripts_name_all_files_they_lack(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, in one message: which files, where they come from, where they belong, how to get them."""
    script = ROOT / "scripts" / "eval" / f"{name}.sh"
    program, *arguments = arguments_of(script, tmp_path)
    assert (program, arguments) == ("main_lpd.py", ["--evaluate", "--recipe", name, "--device", "cpu"])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    head, *lines = error_of(arguments, monkeypatch, capsys).splitlines()
    assert head == "error: 4 files are missing:"
    model, size = re.match(r"(lpd_\w+)_res(\d+)_", name).groups()  # type: ignore[union-attr]
    for line, parts in zip(
        lines,
        (
            (f"checkpoints/{model}_{size}.pth:", f"mit-han-lab/{model}_{size}", f"download {model}_{size}"),
            ("checkpoints/vq_ds16_c2i.pt:", "FoundationVision/LlamaGen", "download vq_ds16_c2i"),
            (f"checkpoints/adm_in{size}_stats.npz:", "VIRTUAL_imagenet", f"--data_path IMAGES --img_size {size}"),
            (f"{tmp_path}/torch/checkpoints/weights-inception", "github.com/toshas", "download inception"),
        ),
        strict=True,
    ):  # fmt: skip
        assert all(part in line for part in parts), line
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("name", TRAIN_RECIPES)
def test_training_scripts_name_all_files_they_lack(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *arguments = arguments_of(ROOT / "scripts" / "train" / f"{name}.sh", tmp_path)
    assert (program, arguments) == ("main_lpd.py", ["--recipe", name, "--device", "cpu"])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    error = error_of(arguments, monkeypatch, capsys)
    size = name.rsplit("_", 1)[1]
    assert f"cached/imagenet_{size}: " in error
    command = f"python main_cache.py --img_size {size} --vqgan_path checkpoints/vq_ds16_c2i.pt --data_path IMAGES"
    assert f"{command} --cached_path cached/imagenet_{size}" in error
    assert ("2 files are missing" in error) == (size == "512")
    if size == "512":
        assert f"checkpoints/{name.replace('512', '256')}.pth: " in error
        assert f"download {name.replace('512', '256')}" in error
    assert not list((tmp_path / "empty").iterdir())


def test_a_missing_file_of_ones_own_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.pth", "tok.pt", "inception.pth"):
        (tmp_path / name).touch()
    given = {"--pretrained_ckpt": "mine.pth", "--vqgan_path": "tok.pt", "--inception_path": "inception.pth"}
    for flag, value, named in (
        ("--pretrained_ckpt", "gone.pth", "a name on the Hugging Face hub"),
        ("--vqgan_path", "gone.pt", "python -m tokenizers.train"),
        ("--reference_statistics", "gone.npz", "python -m engine.metrics"),
        ("--lpd_order_file", "gone.json", "python -m engine.hub download orders"),
        ("--feature_extractor", "inception-v4", "python -m engine.classifier"),
        ("--inception_path", "gone.pth", "github.com/toshas"),
        ("--vqgan_path", "old/vq_ds16_c2i.pt", "get it to checkpoints/vq_ds16_c2i.pt with"),
    ):
        arguments = [part for pair in (given | {flag: value}).items() for part in pair]
        error = error_of(["--evaluate", "--device", "cpu", *arguments], monkeypatch, capsys)
        assert error.startswith(f"error: missing file {value}: ")
        assert named in error
        assert len(error.splitlines()) == 1


def test_published_orders_are_used_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published figures are of these orders; flags that ask for others win."""
    monkeypatch.chdir(tmp_path)
    recipe = ["--evaluate", "--recipe", "lpd_xxl_res256_steps20"]
    assert flags_of(parse(recipe)).lpd_order_file is None
    path = ORDERS_DIR / "res256_steps20_repulsion3.json"
    path.parent.mkdir(parents=True)
    path.touch()
    assert (flags_of(parse(recipe)).lpd_order_file, flags_of(parse(recipe)).order) == (str(path), "lpd")
    assert flags_of(parse([*recipe, "--num_images", "10", "--cfg", "3"])).lpd_order_file == str(path)
    for flags in (
        ("--order", "lpd"), ("--order", "raster"), ("--generation_steps", "32"), ("--group_sizes", "1,255"),
        ("--repulsion_threshold", "2"), ("--proximity_threshold", "2"), ("--num_images", "60000"),
    ):  # fmt: skip
        args = flags_of(parse([*recipe, *flags]))
        assert args.lpd_order_file is None
        assert args.order == ("raster" if "raster" in flags else "lpd")
    assert flags_of(parse([*recipe, "--lpd_order_file", "mine.json"])).lpd_order_file == "mine.json"


def test_released_weights_in_the_other_form_are_found_without_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--pretrained_ckpt", "checkpoints/lpd_l_256.pth"]
    assert parse(flags).pretrained_ckpt == Path("checkpoints/lpd_l_256.pth")
    Path("checkpoints").mkdir()
    Path("checkpoints/lpd_l_256.safetensors").touch()
    assert parse(flags).pretrained_ckpt == Path("checkpoints/lpd_l_256.safetensors")
