"""Command lines with all flags of the published scripts, composed here, with `--dry_run` and tiny networks."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import main_lpd
from engine.options import parse
from engine.training.setup import prepare_training
from models import MODEL_SIZES, build_model
from tests.helpers.commands import ROOT, run
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.tiny_run import make_cache
from tokenizers import save_tokenizer
from util.checkpoint import save_checkpoint
from util.dist import distributed
from util.files import sha256
from util.folder_lock import FolderLock

TINY = MODEL_SIZES["lpd_debug"]
EVALUATION = (
    "--model {model} --img_size {size} --vqgan_path ckpts/vq_ds16_c2i.pt --vqgan_stride 16 --vqgan_vocab_size 16384 "
    "--class_num 1000 --pretrained_ckpt ckpts/{model}_{size}.pth --evaluate --eval_bsz 64 --num_images 50000 --bf16 "
    '--generation_steps {steps} --group_sizes "{schedule}" --order lpd '
    "--lpd_order_file orders/lpd_orders_generated/res{size}_steps{steps}_repulsion{repulsion}.json "
    "--cfg {cfg} --cfg_schedule linear --temperature 1.0 --top_k 0 --top_p 1.0 --seed 0 --num_workers 10 --pin_mem "
    "--output_dir output/{model}_res{size}_steps{steps} --log_dir output/logs --world_size 1 --local_rank -1 "
    "--dist_url env://"
)
TRAINING = (
    "--model {model} --img_size {size} --vqgan_path ckpts/vq_ds16_c2i.pt --vqgan_stride 16 --vqgan_vocab_size 16384 "
    "--group_sizes_list orders/group_sizes_training/group_sizes_{size}.json --epochs {epochs} "
    "--warmup_epochs {warmup} --lr_schedule {schedule} --batch_size {batch} --blr 1e-4 --min_lr 1e-5 "
    "--weight_decay 0.02 --grad_clip 3.0 --label_drop_prob 0.1 --proj_dropout 0.1 --attn_dropout 0.1 "
    "--grad_checkpointing --bf16 --class_num 1000 --use_cached --cached_path cached/imagenet_{size} "
    "--data_path imagenet/train --output_dir output/{model}_{size} --log_dir output/{model}_{size} "
    "--resume output/{model}_{size} --resume_epoch 0 --eval_freq 40 --save_last_freq 5 --save_intermediate_freq 50 "
    "--num_workers 10 --no_pin_mem --seed 1 --dist_on_itp --use_wandb --wandb_project lpd --wandb_run_name {model}"
)
STEPS_20 = "[1]+[2]+[4,5,7,8]+[10,11,12]+[14,15,16,17]+[18]*2+[19]*2+[20]*3"
STEPS_32 = "[1]*2+[2]*2+[3]*2+[4]+[5]*2+[6]*2+[7]*2+[8]*2+[9]*2+[10]*3+[11]*4+[12]*8"
STEPS_48 = json.dumps(
    [*range(1, 23), 23, 23, 24, 25, 26, 26, 27, 28, 28, 29, 29, 30, 30, 31, 31, 32, 32, 32, *[33] * 7, 34]
)
FROM_SCRATCH = {"size": 256, "epochs": 450, "warmup": 50, "schedule": "constant+cosine --lr_decay_start_epoch 400"}
CONTINUED = {"size": 512, "epochs": 50, "warmup": 1, "schedule": "cosine"}
COMMANDS = [
    EVALUATION.format(model=model, size=size, steps=steps, repulsion=repulsion, cfg=cfg, schedule=schedule)
    for model, size, steps, repulsion, cfg, schedule in (
        ("lpd_l", 256, 20, 2, 4.8, STEPS_20),
        ("lpd_xl", 256, 20, 2, 4.9, STEPS_20),
        ("lpd_xxl", 256, 20, 3, 5.9, STEPS_20),
        ("lpd_l", 256, 32, 2, 5.4, STEPS_32),
        ("lpd_xl", 256, 32, 2, 5.0, STEPS_32),
        ("lpd_l", 512, 48, 4, 7.3, STEPS_48),
        ("lpd_xl", 512, 48, 4, 6.0, STEPS_48),
    )
] + [
    *(
        TRAINING.format(model=model, batch=batch, **FROM_SCRATCH)
        for model, batch in (("lpd_l", 64), ("lpd_xl", 32), ("lpd_xxl", 32))
    ),
    *(
        TRAINING.format(model=model, batch=batch, **CONTINUED) + f" --pretrained_ckpt ckpts/{model}_256.pth"
        for model, batch in (("lpd_l", 16), ("lpd_xl", 8))
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the command lines name, of tiny networks and few codes."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "ckpts").mkdir()
    for model in ("lpd_l", "lpd_xl", "lpd_xxl"):
        for size in (256, 512):
            network = build_model("lpd_debug", img_size=size)
            save_checkpoint(folder / "ckpts" / f"{model}_{size}.pth", {"model": network.state_dict()})
    save_tokenizer(tiny_tokenizer(16, 16384), folder / "ckpts" / "vq_ds16_c2i.pt")
    (folder / "cached").mkdir()
    tokenizer_sha256 = sha256(folder / "ckpts" / "vq_ds16_c2i.pt")
    for size in (256, 512):
        make_cache(
            folder / "cached" / f"imagenet_{size}", grid_size=size // 16, vocab_size=16384,
            tokenizer_sha256=tokenizer_sha256,
        )  # fmt: skip
    shutil.copytree(ROOT / "orders" / "group_sizes_training", folder / "orders" / "group_sizes_training")
    orders = folder / "orders" / "lpd_orders_generated"
    for size, steps, repulsion in ((256, 20, 2), (256, 20, 3), (256, 32, 2), (512, 48, 4)):
        name = orders / f"res{size}_steps{steps}_repulsion{repulsion}.json"
        order = list(range((size // 16) ** 2))
        name.parent.mkdir(exist_ok=True)
        name.write_text(json.dumps([order] * 60))
    return folder


@pytest.fixture
def tiny_networks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published names stand for tiny networks, the working directory is `place`, and wandb can be imported."""
    monkeypatch.chdir(place)
    for name in ("lpd_l", "lpd_xl", "lpd_xxl"):
        monkeypatch.setitem(MODEL_SIZES, name, TINY)
    (place / "packages").mkdir(exist_ok=True)
    (place / "packages" / "wandb.py").touch()
    monkeypatch.syspath_prepend(str(place / "packages"))


def name_of(command: str) -> str:
    model, size = command.split()[1], command.split()[3]
    return f"{'eval' if '--evaluate' in command else 'train'}-{model}-{size}"


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_published_command_line_is_taken_as_it_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each gets to where the work would start, and says what takes the place of flags that mean nothing here."""
    words = shlex.split(command)
    # The files of orders hold 60 here, the batch is that of a single process, and Inception is not at hand.
    smaller = ("--num_images", 60, "--batch_size", 64, "--lr", "1e-3", "--feature_extractor", "none")
    assert run(main_lpd.main, *words, *smaller, "--device", "cpu", "--dry_run") == 0
    output = capsys.readouterr()
    announced = json.loads(output.out)
    notes = [line.split()[1] for line in output.err.splitlines() if line.startswith("note: ")]
    unused = {"--log_dir", "--resume_epoch", "--vqgan_stride", "--vqgan_vocab_size", "--pin_mem", "--no_pin_mem"}
    unused |= {"--world_size", "--local_rank", "--dist_on_itp", "--dist_url"}
    assert sorted(notes) == sorted(unused & set(words))
    compared = set()
    for flag, value in announced["settings"].items():
        if f"--{flag}" in words and f"--{flag}" not in smaller and not isinstance(value, bool):
            given = words[words.index(f"--{flag}") + 1]
            assert value == type(value)(given), flag
            compared.add(flag)
    assert compared >= {"model", "img_size", "class_num", "pretrained_ckpt" if "--evaluate" in words else "epochs"}
    assert len(compared) >= 15
    assert announced["model"]["img_size"] == announced["settings"]["img_size"]
    assert not Path("output").exists()


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("there", [True, False])
def test_resume_names_a_folder_without_checkpoints(
    place: Path, there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name may have a dot; a checkpoint that is not there is still a mistake."""
    folder = place / f"run.{there}"
    if there:
        folder.mkdir()
    words = [*shlex.split(COMMANDS[7]), "--batch_size", 8, "--lr", "1e-3", "--device", "cpu", "--dry_run"]
    assert run(main_lpd.main, *words, "--resume", folder) == 0
    assert run(main_lpd.main, *words, "--resume", folder / "checkpoint-3.pth") == 2
    assert "checkpoint-3.pth does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_networks")
def test_a_published_training_draws_from_the_schedules_of_its_file(place: Path) -> None:
    """And starts from the beginning where --resume names a folder that is not there yet."""
    rows = [[1] * 200 + [56], [1, 55, 200]]
    (place / "two.json").write_text(json.dumps(rows))
    words = [*shlex.split(COMMANDS[7]), "--group_sizes_list", "two.json", "--device", "cpu", "--dry_run"]
    with distributed("cpu") as dist, FolderLock(place / "output") as lock:
        prepared = prepare_training(parse([*words, "--batch_size", "8", "--lr", "1e-3"]), dist, lock)
    assert [list(row) for row in prepared.schedules] == rows
    assert prepared.start_from is None


def test_the_published_name_of_the_program_runs_it() -> None:
    ours = subprocess.run([sys.executable, ROOT / "main.py", "--epochs", "0"], capture_output=True, text=True)
    assert (ours.returncode, ours.stderr) == (
        2,
        "error: --epochs is 0; it must be at least 1; --help explains the flags.\n",
    )


@pytest.mark.parametrize(("value", "status"), [("[1]*256", 0), ("__import__('os').abort()", 2), ("[1]*10**9", 2)])
@pytest.mark.usefixtures("tiny_networks")
def test_an_expression_of_group_sizes_is_read_and_not_run(value: str, status: int) -> None:
    words = shlex.split(COMMANDS[0])
    del words[words.index("--lpd_order_file") : words.index("--lpd_order_file") + 2]  # it is for 20 steps
    smaller = ("--num_images", 60, "--feature_extractor", "none", "--device", "cpu", "--dry_run")
    assert run(main_lpd.main, *words, *smaller, "--group_sizes", value) == status
