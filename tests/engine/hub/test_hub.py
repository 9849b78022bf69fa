"""Downloads, names on the hub, exported models: against a hub on the loopback interface, never the real one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, file_download

import engine.hub.download
import main_lpd
from engine.hub.__main__ import main
from engine.hub.download import download, download_all
from engine.hub.export import export, push
from engine.hub.remote import choose_tokenizer, choose_weights, fetch, find_file, hub_name, list_files, own_tokenizer
from engine.options import parse
from engine.scoring import features
from models.lpd import LPD, LPDConfig, load_weights
from orders import generate_orders, save_orders
from tests.helpers.commands import ROOT
from tests.helpers.commands import run as run_command
from tests.helpers.fake_hub import FakeHub, start
from tests.helpers.processes import holder
from tests.helpers.tiny_models import tiny_tokenizer
from tokenizers import load_tokenizer, save_tokenizer
from util.checkpoint import HASHES, load_checkpoint, save_checkpoint
from util.errors import UserError
from util.files import sha256

TINY = LPDConfig(img_size=16, stride=4, embed_dim=16, depth=1, num_heads=2, class_num=3, vocab_size=12)
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub that huggingface_hub talks to; the working directory and the hub's cache are empty folders."""
    hub = FakeHub()
    server = start(hub)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield hub
    server.shutdown()
    server.server_close()


def state_dict(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return LPD(TINY).state_dict()


def file_bytes(payload: object, path: Path) -> bytes:
    torch.save(payload, path)
    return path.read_bytes()


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_download_arrives_checked_and_is_not_repeated(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["user/model"] = {"a.pth": CONTENT, "notes.txt": b"small"}
    place = tmp_path / "files" / "a.pth"
    files = {file.name: file for file in list_files("user/model")}
    for _ in range(2):
        fetch(files["a.pth"], place)
        fetch(files["notes.txt"], place.with_name("notes.txt"))
    assert place.read_bytes() == CONTENT
    assert len(hub.ranges("a.pth")) == 2, "one redirect, one content"
    assert not hub.leaked, "the user's token goes to the hub alone"
    assert left_behind(place.parent) == ["a.pth", "notes.txt"]
    place.write_bytes(b"a user's own file")
    with pytest.raises(UserError, match="it is kept"):
        fetch(files["a.pth"], place)
    assert place.read_bytes() == b"a user's own file"


def test_cut_connection_is_resumed(hub: FakeHub, tmp_path: Path) -> None:
    """A connection that breaks twice costs what was on the way, not what had arrived."""
    hub.repos["user/model"] = {"a.pth": CONTENT}
    hub.cut["a.pth"] = [4100, 2500]
    fetch(list_files("user/model")[0], tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == CONTENT
    spans = [int(span[6:-1]) if span else 0 for span in hub.ranges("a.pth")[1::2]]
    assert len(spans) == 3
    assert 0 == spans[0] < spans[1] < spans[2] < len(CONTENT)


def test_killed_download_is_resumed(hub: FakeHub, tmp_path: Path) -> None:
    """kill -9 in the middle: nothing under the final name, and the next call asks for the rest only."""
    hub.repos["user/model"] = {"a.pth": CONTENT}
    hub.cut["a.pth"], hub.stall = [6000], threading.Event()
    program = (
        "import sys; from pathlib import Path; from huggingface_hub import constants; "
        "constants.DOWNLOAD_CHUNK_SIZE = 1000; from engine.hub.remote import fetch, list_files; "
        "fetch(list_files('user/model')[0], Path(sys.argv[1]))"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path / "new" / "a.pth"], env=environment, cwd=ROOT)
    wait = threading.Event()
    for _ in range(600):
        parts = list((tmp_path / "new").glob(".a*.part.pth"))
        if parts and parts[0].stat().st_size > 0:
            break
        assert process.poll() is None
        wait.wait(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.stall.set()
    kept = parts[0].stat().st_size
    assert 0 < kept < len(CONTENT)
    assert not (tmp_path / "new" / "a.pth").exists()
    fetch(list_files("user/model")[0], tmp_path / "new" / "a.pth")
    assert (tmp_path / "new" / "a.pth").read_bytes() == CONTENT
    assert hub.ranges("a.pth")[-1] == f"bytes={kept}-"


def test_two_jobs_download_once(hub: FakeHub, tmp_path: Path) -> None:
    """Jobs that start together with the same name must not write into one part."""
    hub.repos["user/model"] = {"a.pth": CONTENT}
    hub.cut["a.pth"], hub.stall = [6000], threading.Event()
    file = list_files("user/model")[0]
    jobs = [threading.Thread(target=fetch, args=(file, tmp_path / "a.pth")) for _ in range(2)]
    for job in jobs:
        job.start()
    for _ in range(6000):
        if hub.ranges("a.pth"):
            break
        threading.Event().wait(0.01)
    hub.stall.set()
    for job in jobs:
        job.join()
    assert (tmp_path / "a.pth").read_bytes() == CONTENT
    assert len(hub.ranges("a.pth")) == 4, "a redirect and content, twice because of the cut"


@pytest.mark.parametrize("name", ["a.pth", "notes.txt"])
def test_wrong_content_is_refused_and_dropped(hub: FakeHub, tmp_path: Path, name: str) -> None:
    """One wrong byte, the size being right: neither the final name nor a part to resume from may remain."""
    hub.repos["user/model"] = {name: CONTENT}
    hub.altered.add(name)
    with pytest.raises(UserError, match="hash differs"):
        fetch(list_files("user/model")[0], tmp_path / "new" / name)
    assert not any(path.suffix != ".lock" for path in (tmp_path / "new").iterdir())
    hub.altered.clear()
    fetch(list_files("user/model")[0], tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes() == CONTENT


@pytest.fixture
def published(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The published repositories with tiny files."""
    monkeypatch.setattr(engine.hub.download, "model_config", lambda name, img_size: TINY)
    for name in ("lpd_l_256", "lpd_xl_256", "lpd_xxl_256", "lpd_l_512", "lpd_xl_512"):
        content = file_bytes({"model": state_dict(), "epoch": 449}, tmp_path / "x")
        hub.repos[f"mit-han-lab/{name}"] = {"README.md": b"", f"weights/{name}-final.pth": content}
    save_tokenizer(tiny_tokenizer(), tmp_path / "x.pt")
    hub.repos["FoundationVision/LlamaGen"] = {
        "vq_ds16_c2i.pt": (tmp_path / "x.pt").read_bytes(),
        "c2i_B_256.pt": b"another",
    }
    orders = generate_orders("random", 3, (1, 255), 16, seed=0)
    save_orders(tmp_path / "x.json", orders)
    name = "lpd_orders_generated/res256_steps20_repulsion2.json"
    hub.repos["datasets/mit-han-lab/lpd_orders"] = {name: (tmp_path / "x.json").read_bytes(), "README.md": b""}
    inception = file_bytes({"a": torch.zeros(1)}, tmp_path / "x")
    hub.repos["torch/fidelity"] = {"inception.pth": inception}
    monkeypatch.setattr(features, "INCEPTION_URL", f"{hub.url}/torch/fidelity/resolve/main/inception.pth")
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", sha256(tmp_path / "x")[:8])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return hub


def test_download_all_puts_files_where_recipes_look(published: FakeHub, tmp_path: Path) -> None:
    download_all(["all"])
    assert left_behind(Path("checkpoints")) == sorted(
        [f"{name}.pth" for name in engine.hub.download.DOWNLOADS if name.startswith("lpd")] + ["vq_ds16_c2i.pt"]
    )
    assert {str(entry.place) for entry in engine.hub.download.DOWNLOADS.values()} == {
        str(path) for path in Path("checkpoints").iterdir()
    }
    assert left_behind(Path("orders/lpd_orders_generated")) == ["res256_steps20_repulsion2.json"]
    assert left_behind(tmp_path / "torch" / "checkpoints") == [features.INCEPTION_FILE]


def test_files_that_are_not_what_they_should_be_are_dropped(published: FakeHub, tmp_path: Path) -> None:
    """A file may arrive as it is on the hub and still not hold weights of this size, or any at all."""
    other = dict(state_dict(), pos_embed=torch.zeros(1, 5, 16))
    for content, named in ((file_bytes(other, tmp_path / "x"), "pos_embed"), (b"no weights", "damaged")):
        published.repos["mit-han-lab/lpd_l_256"] = {"a.pth": content}
        with pytest.raises(UserError, match=named):
            download("lpd_l_256")
        assert not list(Path("checkpoints").glob("*.pth"))
    published.repos["datasets/mit-han-lab/lpd_orders"] = {"res256_steps20_repulsion2.json": b"[[0, 1"}
    with pytest.raises(UserError, match="res256_steps20_repulsion2"):
        download("orders")
    assert not list(Path("orders/lpd_orders_generated").glob("*.json"))


@pytest.mark.parametrize(
    ("files", "named"),
    [({"README.md": b""}, "there is none"), ({"a.pth": b"1", "b.safetensors": b"2"}, r"several, a\.pth, b\.safetens")],
)
def test_repository_without_one_file_of_weights(published: FakeHub, files: dict[str, bytes], named: str) -> None:
    published.repos["mit-han-lab/lpd_l_256"] = files
    with pytest.raises(UserError, match=named):
        download("lpd_l_256")


def test_safetensors_of_a_recipe_keep_their_suffix(published: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published file names are not documented; a recipe must find the weights in either form."""
    assert str(parse(["--evaluate", "--recipe", "lpd_l_res256_steps20"]).pretrained_ckpt).endswith(".pth")
    content = safetensors.torch.save(state_dict())
    published.repos["mit-han-lab/lpd_l_256"] = {"a.safetensors": content}
    download("lpd_l_256")
    found = parse(["--evaluate", "--recipe", "lpd_l_res256_steps20"]).pretrained_ckpt
    assert found == Path("checkpoints/lpd_l_256.safetensors")
    assert load_checkpoint(found)["model"].keys() == state_dict().keys()


def run(*arguments: object) -> int:
    """Exit status of the command."""
    return run_command(main, *arguments)


def test_one_failure_does_not_keep_the_rest_from_coming(published: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a repository, or without network, the message names file, origin and place."""
    del published.repos["mit-han-lab/lpd_l_256"]
    assert run("download", "lpd_l_256", "vq_ds16_c2i") == 2
    error = capfd.readouterr().err
    assert left_behind(Path("checkpoints")) == ["vq_ds16_c2i.pt"]
    for part in ("no such repository", "https://huggingface.co/mit-han-lab/lpd_l_256", "checkpoints/lpd_l_256.pth"):
        assert part in error
    assert error.splitlines()[-1].startswith("error: not downloaded: lpd_l_256 (")


@pytest.fixture
def closed_port() -> Iterator[str]:
    """A port that refuses connections: nobody listens, and no other program can take it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


def test_without_network(published: FakeHub, closed_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in (("ENDPOINT", closed_port), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(constants, setting, value)
        for name, place in (("lpd_l_256", "checkpoints/lpd_l_256.pth"), ("orders", "orders/lpd_orders_generated")):
            with pytest.raises(UserError) as raised:
                download(name)
            message = str(raised.value)
            assert "https://huggingface.co/mit-han-lab/" in message
            assert place in message
            assert "\n" not in message


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path must not become a request to the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for text, expected in {
        "mit-han-lab/lpd_l_256": ("mit-han-lab/lpd_l_256", None),
        "hf:user/model": ("user/model", None),
        "hf:runs/mine": ("runs/mine", None),
        "hf:user/model/sub/a.pth": ("user/model", "sub/a.pth"),
        "runs/mine": None,
        "runs/other": None,
        "user/model.pth": None,
        "user/tokenizer.pt": None,
        "model.pth": None,
        "a/b/c": None,
        "/etc/model": None,
        "../model": None,
    }.items():
        assert hub_name(Path(text)) == expected, text


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A training checkpoint with averaged weights, and the tokenizer beside it."""
    save_tokenizer(tiny_tokenizer(), tmp_path / "tok.pt")
    path = tmp_path / "run" / "checkpoint-last.pth"
    content = {"model": state_dict(0), "model_ema": state_dict(1), "optimizer": {"state": torch.zeros(3)}, "step": 7}
    content |= {"config": vars(TINY), "classes": ["a", "b", "ç"], "tokenizer_sha256": sha256(tmp_path / "tok.pt")}
    save_checkpoint(path, content)
    return path


def assert_same_model(path: Path, checkpoint: Path, key: str = "model") -> None:
    """Equal weights bit for bit, configuration, classes and tokenizer; nothing of the training."""
    found, expected = load_checkpoint(path), load_checkpoint(checkpoint)
    assert found.keys() == {"model", "config", "classes", "tokenizer_sha256"}
    assert {name: found[name] for name in ("config", "classes")} == {
        name: expected[name] for name in ("config", "classes")
    }
    assert found["tokenizer_sha256"] == expected["tokenizer_sha256"]
    assert found["model"].keys() == expected[key].keys()
    assert all(torch.equal(found["model"][name], value) for name, value in expected[key].items())
    load_weights(LPD(LPDConfig(**found["config"])), found["model"], str(path))


def test_exported_model_loads_by_folder_and_file(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert run("export", checkpoint, folder) == 0
    assert left_behind(folder) == ["README.md", "config.json", "model.safetensors"]
    for path in (folder, folder / "model.safetensors"):
        assert_same_model(find_file(path), checkpoint)
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["format_version"], config["config"]["depth"]) == ("lpd", 1, 1)
    assert run("export", checkpoint, folder, "--ema", "--vqgan_path", tmp_path / "tok.pt") == 0
    assert_same_model(find_file(folder), checkpoint, "model_ema")
    assert find_file(folder, choose_tokenizer).read_bytes() == (tmp_path / "tok.pt").read_bytes()
    assert run("export", checkpoint, folder, "--vqgan_path", folder / "tokenizer.pt") == 0, "its own copy"
    assert find_file(folder, choose_tokenizer).read_bytes() == (tmp_path / "tok.pt").read_bytes()
    assert run("export", checkpoint, folder) == 0
    assert not (folder / "tokenizer.pt").exists(), "of the export before"


def test_a_small_export_holds_the_rounded_weights_and_notes(checkpoint: Path, tmp_path: Path) -> None:
    folder, notes = tmp_path / "exported", tmp_path / "notes.md"
    notes.write_text("## Data\n\nDigits, public domain.\n")
    tokenizer = tmp_path / "tok.pt"
    assert run("export", checkpoint, folder, "--vqgan_path", tokenizer) == 0
    size = (folder / "model.safetensors").stat().st_size
    assert run("export", checkpoint, folder, "--vqgan_path", tokenizer, "--bf16", "--notes", notes) == 0
    assert left_behind(folder) == ["README.md", "config.json", "model.safetensors", "tokenizer.safetensors"]
    assert (folder / "model.safetensors").stat().st_size < 0.6 * size
    assert run("export", checkpoint, tmp_path / "again", "--vqgan_path", tokenizer, "--bf16") == 0
    for name in ("model.safetensors", "tokenizer.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert "Digits, public domain." in (folder / "README.md").read_text()
    content, full = load_checkpoint(folder / "model.safetensors"), load_checkpoint(checkpoint)["model"]
    assert all(torch.equal(content["model"][name], full[name].bfloat16()) for name in full)
    assert content["tokenizer_sha256"] == sha256(folder / "tokenizer.safetensors")
    found, given = (load_tokenizer(path).state_dict() for path in (folder / "tokenizer.safetensors", tokenizer))
    assert all(torch.equal(found[name], given[name].bfloat16().float()) for name in given)
    with pytest.raises(UserError, match=r"notes .*gone\.md does not exist"):
        export(checkpoint, tmp_path / "wrong", notes=tmp_path / "gone.md")


def test_pushed_model_loads_by_name(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Export, push, load by name; again from the cache without network; a damaged cache is noticed."""
    folder = tmp_path / "exported"
    export(checkpoint, folder, vqgan_path=tmp_path / "tok.pt")
    (folder / "notes.txt").write_text("private")
    assert run("push", folder, "user/digits") == 0
    assert sorted(hub.repos["user/digits"]) == ["README.md", "config.json", "model.safetensors", "tokenizer.pt"]
    with pytest.raises(UserError, match="user/digits is not on this machine"):
        find_file(Path("user/digits"), download=False)
    assert hub.ranges("model.safetensors") == []
    found = find_file(Path("user/digits"))
    assert find_file(Path("user/digits"), download=False) == found
    assert_same_model(found, checkpoint)
    tokenizer = find_file(Path("user/digits"), choose_tokenizer)
    assert sha256(tokenizer) == sha256(tmp_path / "tok.pt")
    asked = len(hub.ranges("model.safetensors"))
    find_file(Path("hf:user/digits/model.safetensors"))
    assert len(hub.ranges("model.safetensors")) == asked, "the cache holds it"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_file(Path("user/digits")) == found
    assert find_file(Path("user/digits"), choose_tokenizer) == tokenizer
    assert "HF_HUB_OFFLINE is set; taken from the hub's cache" in capfd.readouterr().err
    with pytest.raises(UserError, match="nor is it cached"):
        find_file(Path("user/other"))
    link = found.rename(tmp_path / "link")
    with pytest.raises(UserError, match="nor is it cached"):  # config.json alone is
        find_file(Path("user/digits"))
    found.symlink_to(tmp_path / "cache" / "models--user--digits" / "blobs" / link.readlink().name)
    found.resolve().write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        find_file(Path("user/digits"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert_same_model(find_file(Path("user/digits")), checkpoint)
    with pytest.raises(UserError, match=r"no file model\.pth; it holds README\.md"):
        find_file(Path("hf:user/digits/model.pth"))
    with pytest.raises(UserError, match="no such repository"):
        find_file(Path("user/other"))


def test_evaluation_by_name(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """A shared model generates on another machine, which has nothing but its name."""
    export(checkpoint, tmp_path / "exported", vqgan_path=tmp_path / "tok.pt")
    hub.repos["user/digits"] = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    flags = "--evaluate --device cpu --pretrained_ckpt user/digits --generation_steps 3"
    flags += " --num_images 3 --feature_extractor none --output_dir out"
    assert run_command(main_lpd.main, *flags.split(), "--dry_run") == 2
    assert hub.ranges("model.safetensors") == []
    assert run_command(main_lpd.main, *flags.split()) == 0
    record = json.loads(Path("out/results.json").read_text())["record"]
    assert record["pretrained_ckpt"]["sha256"] == sha256(tmp_path / "exported" / "model.safetensors")
    assert "models--user--digits" in record["pretrained_ckpt"]["path"]
    assert record["vqgan_path"]["sha256"] == sha256(tmp_path / "tok.pt"), "the repository's own"


def test_a_models_own_tokenizer_is_that_of_its_folder(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """Guards against the weights being opened as a tokenizer where one file is named."""
    export(checkpoint, tmp_path / "exported", vqgan_path=tmp_path / "tok.pt")
    for name in (tmp_path / "exported", Path("user/digits"), Path("hf:user/digits")):
        assert own_tokenizer(name) == name
    for other in (None, checkpoint, Path("hf:user/digits/model.safetensors"), tmp_path / "nowhere"):
        assert own_tokenizer(other) is None


def test_an_export_after_a_killed_one(checkpoint: Path, tmp_path: Path) -> None:
    """Guards against a repeat that its own leftovers block, and against two exports into one folder."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / ".model.safetensors.here.1.tmp").write_bytes(b"half")
    with holder(folder), pytest.raises(UserError, match="another process is writing to"):
        export(checkpoint, folder)
    export(checkpoint, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_exported_files_follow_the_umask(checkpoint: Path, tmp_path: Path) -> None:
    """Guards against one that its owner's group cannot read, as safetensors writes them."""
    mask = os.umask(0o027)
    try:
        export(checkpoint, tmp_path / "exported", vqgan_path=tmp_path / "tok.pt")
    finally:
        os.umask(mask)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "exported").iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "config.json", "README.md", "tokenizer.pt"), "0o640")


def test_released_weights_load_by_name(published: FakeHub, tmp_path: Path) -> None:
    """A released repository holds a .pth of any name, and perhaps another project's config.json."""
    published.repos["mit-han-lab/lpd_l_256"]["config.json"] = b'{"architectures": ["X"]}'
    found = load_checkpoint(find_file(Path("mit-han-lab/lpd_l_256")))
    assert "config" not in found
    assert found["model"].keys() == state_dict().keys()
    tokenizer = find_file(Path("hf:FoundationVision/LlamaGen/vq_ds16_c2i.pt"), choose_tokenizer)
    assert tokenizer.read_bytes() == published.repos["FoundationVision/LlamaGen"]["vq_ds16_c2i.pt"]


def test_mistakes_in_export_and_push(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = load_checkpoint(checkpoint)
    for change, flags, named in (
        ({"model_ema": None}, {"ema": True}, "no moving average"),
        ({"config": None}, {}, "no configuration"),
        ({"tokenizer_sha256": "0" * 64}, {"vqgan_path": tmp_path / "tok.pt"}, "another tokenizer"),
        ({"model": {"a": torch.zeros(1)}}, {}, "is missing"),
    ):
        torch.save({key: value for key, value in (content | change).items() if value is not None}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=named):
            export(tmp_path / "x.pth", tmp_path / "wrong", **flags)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(UserError, match="which no export wrote"):
        export(checkpoint, checkpoint.parent)
    with pytest.raises(UserError, match="does not exist"):
        push(tmp_path / "nowhere", "user/model")
    export(checkpoint, tmp_path / "exported")
    with pytest.raises(UserError, match=re.escape("a..b")):
        push(tmp_path / "exported", "a..b/c")
    export(checkpoint, tmp_path / "exported", vqgan_path=tmp_path / "tok.pt")
    with open(tmp_path / "exported" / "tokenizer.pt", "ab") as file:
        file.write(b"0")
    with pytest.raises(UserError, match=r"tokenizer\.pt is damaged or not the one"):
        push(tmp_path / "exported", "user/model")
    export(checkpoint, tmp_path / "exported")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="hf auth login"):
        push(tmp_path / "exported", "user/model")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format_version": 2}, "version 2"),
        ({"config": {"depth": "1"}}, "damaged"),
        ({"config": None}, "damaged"),
        ({"classes": [1, 2]}, "damaged"),
    ],
)
def test_damaged_config_is_one_sentence(checkpoint: Path, tmp_path: Path, change: dict, named: str) -> None:
    """In a folder of an earlier export, which has no hashes."""
    export(checkpoint, tmp_path / "exported")
    path = tmp_path / "exported" / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in HASHES}
    path.write_text(json.dumps(values))
    assert_same_model(tmp_path / "exported" / "model.safetensors", checkpoint)
    path.write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=named):
        load_checkpoint(tmp_path / "exported" / "model.safetensors")
    path.write_text("{")
    with pytest.raises(UserError, match="not readable"):
        load_checkpoint(tmp_path / "exported" / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_no_changed_bit_of_an_exported_folder_is_loaded(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """A flipped weight, or another number of heads, fits the model and gives other pictures."""
    export(checkpoint, tmp_path / "exported")
    weights, path = tmp_path / "exported" / "model.safetensors", tmp_path / "exported" / name
    whole = path.read_bytes()
    if name == "config.json":
        for part in (b"num_heads", b'"num_heads": 2', b'"lpd"', b"weights_sha256", b"config_sha256"):
            path.write_bytes(whole.replace(part, bytes([*part[:-1], part[-1] ^ 1])))
            with pytest.raises(UserError, match="damaged"):
                load_checkpoint(weights)
        path.write_text(json.dumps(json.loads(whole)))  # laid out otherwise
        assert_same_model(weights, checkpoint)
    for place in np.random.default_rng(0).choice(len(whole), 40, replace=False):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with contextlib.suppress(UserError):
            assert_same_model(weights, checkpoint)  # a flipped blank of the JSON


def test_choices_among_files() -> None:
    assert choose_weights(["model.safetensors", "old.pth"], "x") == "model.safetensors"
    assert choose_weights(["tokenizer.safetensors", "a.pth"], "x") == "a.pth"
    assert choose_tokenizer(["model.safetensors", "tokenizer.pt"], "x") == "tokenizer.pt"
    with pytest.raises(UserError, match="holds no tokenizer"):
        choose_tokenizer(["model.safetensors"], "x")
