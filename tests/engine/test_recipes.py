"""The published runs: every recipe builds the published network, every script starts and says what it lacks."""

from __future__ import annotations

import dataclasses
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
from engine.recipes import EVAL_RECIPES, EXPECTED, RELEASED, TOKENIZER, TRAIN_RECIPES, checkpoint_path
from models import MODEL_SIZES
from models.lpd import LPD
from orders import group_sizes
from tests.helpers.commands import ROOT, run
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


# Model, pixels, steps, repulsion, guidance; FID, Inception Score, seconds at batch 1, images/s at batch 64 (paper).
PUBLISHED_ROWS = {
    "lpd_l_res256_steps20": ("lpd_l", 256, 20, 2, 4.8, 2.40, 284.5, 0.28, 139.11),
    "lpd_xl_res256_steps20": ("lpd_xl", 256, 20, 2, 4.9, 2.10, 326.7, 0.41, 75.20),
    "lpd_xxl_res256_steps20": ("lpd_xxl", 256, 20, 3, 5.9, 2.00, 337.6, 0.55, 45.07),
    "lpd_l_res256_steps32": ("lpd_l", 256, 32, 2, 5.4, 2.29, 282.7, 0.46, 110.34),
    "lpd_xl_res256_steps32": ("lpd_xl", 256, 32, 2, 5.0, 1.92, 319.4, 0.66, 61.24),
    "lpd_l_res512_steps48": ("lpd_l", 512, 48, 4, 7.3, 2.54, 292.2, 0.69, 35.16),
    "lpd_xl_res512_steps48": ("lpd_xl", 512, 48, 4, 6.0, 2.10, 326.0, 1.01, 18.18),
}
# Model, pixels, epochs, warm-up, schedule, decay from, images per GPU.
PUBLISHED_TRAININGS = {
    "lpd_l_256": ("lpd_l", 256, 450, 50, "constant+cosine", 400, 64),
    "lpd_xl_256": ("lpd_xl", 256, 450, 50, "constant+cosine", 400, 32),
    "lpd_xxl_256": ("lpd_xxl", 256, 450, 50, "constant+cosine", 400, 32),
    "lpd_l_512": ("lpd_l", 512, 50, 1, "cosine", None, 16),
    "lpd_xl_512": ("lpd_xl", 512, 50, 1, "cosine", None, 8),
}


@pytest.mark.parametrize("name", EVAL_RECIPES)
def test_evaluation_recipes_are_the_published_rows(name: str) -> None:
    """A mistyped guidance or step count would cost a night and look like a bad model."""
    args = flags_of(parse(["--evaluate", "--recipe", name, "--eval_bsz", "8"]))
    sampling = (args.model, args.img_size, args.generation_steps, args.repulsion_threshold, args.cfg)
    assert sampling + dataclasses.astuple(EXPECTED[name]) == PUBLISHED_ROWS[name]
    assert (args.cfg_schedule, args.temperature, args.top_k, args.top_p) == ("linear", 1.0, 0, 1.0)
    assert (args.num_images, args.bf16, args.eval_bsz) == (50_000, True, 8)
    assert args.pretrained_ckpt == checkpoint_path(args.model, args.img_size)


@pytest.mark.parametrize("name", TRAIN_RECIPES)
def test_training_recipes_are_the_published_runs(name: str) -> None:
    parsed = parse(["--recipe", name])
    args, config = flags_of(parsed), parsed.training
    assert config is not None
    decay = config.lr_decay_start_epoch if config.lr_schedule == "constant+cosine" else None
    run_of = (args.model, args.img_size, config.epochs, config.warmup_epochs, config.lr_schedule, decay)
    assert (*run_of, config.batch_size) == PUBLISHED_TRAININGS[name]
    optimisation = (config.lr, config.blr, config.min_lr, config.weight_decay, config.grad_clip, config.bf16)
    assert optimisation == (None, 1e-4, 1e-5, 0.02, 3.0, True)
    assert (args.label_drop_prob, args.proj_dropout, args.attn_dropout) == (0.1, 0.1, 0.0)


@pytest.mark.parametrize("name", TRAIN_RECIPES)
def test_a_recipe_keeps_its_schedule_beside_another_number_of_epochs(name: str) -> None:
    """Guards against the shares of small runs getting into published ones."""
    longer, recipe = parse(["--recipe", name, "--epochs", "900"]).training, parse(["--recipe", name]).training
    assert longer is not None
    assert recipe is not None
    assert (longer.epochs, longer.warmup_epochs) == (900, recipe.warmup_epochs)
    if recipe.lr_schedule == "constant+cosine":
        assert longer.lr_decay_start_epoch == recipe.lr_decay_start_epoch == 400


def test_recipes_cover_the_published_tables() -> None:
    assert EVAL_RECIPES.keys() == PUBLISHED_ROWS.keys()
    assert TRAIN_RECIPES.keys() == PUBLISHED_TRAININGS.keys()


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


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What main_lpd.py says in an empty folder, when it ends with status 2."""
    assert run(main_lpd.main, *arguments) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_published_script_runs_the_program() -> None:
    """What it lacks is one sentence, and the status 2 arrives."""
    command = ["bash", str(ROOT / "scripts" / "eval" / "lpd_l_res256_steps20.sh"), "--device", "cpu"]
    environment = os.environ | {"NPROC_PER_NODE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["--pretrained_ckpt", "nowhere.pth"]  # whatever has been downloaded
    result = subprocess.run([*command, *words], capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "nowhere.pth: " in result.stderr
    assert "Traceback" not in result.stderr


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
    head, *lines = error_of(arguments, capsys).splitlines()
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
    error = error_of(arguments, capsys)
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
        error = error_of(["--evaluate", "--device", "cpu", *arguments], capsys)
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
        ("--schedule_file", "mine.json"),
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
