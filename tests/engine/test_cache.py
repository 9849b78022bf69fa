"""Caching codes: complete, resumable, the same for any number of processes, and refused where it should be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main_cache
from engine import cache as cache_module
from engine.cache import CacheConfig, build_cache
from tests.helpers.commands import ROOT, run
from tests.helpers.processes import ALONE
from tests.helpers.tiny_models import tiny_tokenizer, write_images
from tokenizers import VQConfig, VQModel, load_tokenizer, save_tokenizer
from util.data.codes import PARTS, CacheHeader, open_codes, verify_files
from util.data.images import ImageFolder, write_image_archive
from util.errors import UserError
from util.files import sha256
from util.pictures import to_float

SIZE = 8  # pixels; 4×4 codes


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer") / "vq.pt"
    save_tokenizer(tiny_tokenizer(2, 32), path)
    return path


def _write_images(root: Path, counts: dict[str, int]) -> Path:
    return write_images(root, counts, SIZE + 3, SIZE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 images: with parts of 4, three parts, one of them across the two classes and the last one short."""
    return _write_images(tmp_path_factory.mktemp("images"), {"cat": 6, "dog": 5})


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PART_SIZE", 4)


def _contents(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.iterdir() if file.suffix == ".npy"}


def _cache(images: Path, to: Path, vqgan: Path, **options: Any) -> CacheHeader:
    settings: dict[str, Any] = {"data_path": str(images), "img_size": SIZE, "batch_size": 3, "num_workers": 0} | options
    return build_cache(CacheConfig(vqgan, to, **settings), ALONE)


def _convert(npz: Path, to: Path, vqgan: Path, img_size: int = SIZE) -> CacheHeader:
    return build_cache(CacheConfig(vqgan, to, convert_from=str(npz), img_size=img_size, num_workers=0), ALONE)


def _npz_layout(images: Path, vqgan: Path, to: Path) -> Path:
    """The published layout, made image by image: <class>/<image>.npz with indices and indices_flip."""
    tokenizer, folder = load_tokenizer(vqgan), ImageFolder(images, SIZE)
    for i, name in enumerate(folder.paths):
        x = to_float(folder.load(i)[None])
        file = (to / name).with_suffix(".npz")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, indices=tokenizer.encode(x)[0].numpy(), indices_flip=tokenizer.encode(x.flip(-1))[0].numpy())
    return to


def test_rows_are_the_codes_of_each_crop_and_its_mirror_image(images: Path, vqgan: Path, tmp_path: Path) -> None:
    """Guards against rows out of order, labels of other images, a flip along the wrong axis, or part borders lost."""
    header = _cache(images, tmp_path / "cache", vqgan)
    reference = open_codes(_npz_layout(images, vqgan, tmp_path / "npz"))
    cached = open_codes(tmp_path / "cache", img_size=SIZE)
    for got, wanted in zip(cached.get_batch(range(11)), reference.get_batch(range(11)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert cached.labels.tolist() == [0] * 6 + [1] * 5
    assert cached.classes == ["cat", "dog"]
    assert header.tokenizer_sha256 == sha256(vqgan)
    assert header.max_code == int(np.concatenate([np.ravel(c) for c in cached.get_batch(range(11))[:2]]).max())
    assert not (tmp_path / "cache" / PARTS).exists()


def test_pictures_of_every_kind_have_the_codes_of_their_rgb_selves(vqgan: Path, tmp_path: Path) -> None:
    """Guards against a crash or other codes for files that are not plain RGB."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    # What ADM's loader makes of a mode is Pillow's conversion, which clips 16 bits; a noted rotation is ignored.
    odd = {"grey.png": "L", "palette.png": "P", "print.tif": "CMYK", "alpha.png": "RGBA", "line.png": "1"}
    for folder in ("odd", "plain"):
        (tmp_path / folder / "a").mkdir(parents=True)
    for name, mode in odd.items():
        picture = rgb.convert(mode)
        picture.save(tmp_path / "odd" / "a" / name)
        picture.convert("RGB").save(tmp_path / "plain" / "a" / f"{Path(name).stem}.png")
    grey = np.asarray(rgb.convert("L"))
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "odd" / "a" / "deep.png")
    Image.fromarray(grey).convert("RGB").save(tmp_path / "plain" / "a" / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb.save(tmp_path / "odd" / "a" / "phone.png", exif=turned)
    rgb.save(tmp_path / "plain" / "a" / "phone.png")
    for folder in ("odd", "plain"):
        _cache(tmp_path / folder, tmp_path / f"{folder}_codes", vqgan)
    assert _contents(tmp_path / "odd_codes") == _contents(tmp_path / "plain_codes")
    assert len(open_codes(tmp_path / "odd_codes")) == 7


@pytest.mark.slow
def test_killed_run_is_finished_by_two_processes(vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against lost, doubled or shifted images after kill -9, and against codes that depend on the processes."""
    monkeypatch.undo()  # the processes have the real size of parts
    images = _write_images(tmp_path / "images", {"a": 500, "b": 300})
    _cache(images, tmp_path / "one", vqgan, batch_size=64)

    flags = [
        f"--img_size={SIZE}",
        f"--vqgan_path={vqgan}",
        f"--data_path={images}",
        f"--cached_path={tmp_path / 'two'}",
    ]
    flags += ["--num_workers=0", "--batch_size=64", "--device=cpu"]
    # Dies in the second part: batch 6 of 4 batches to a part, two calls of encode each.
    script = f"""
import os, sys
sys.argv = {["main_cache.py", *flags]!r}
import main_cache
from tokenizers import VQModel
encode, calls = VQModel.encode, []
def counted(self, images):
    calls.append(1)
    if len(calls) > 11:
        os.kill(os.getpid(), 9)
    return encode(self, images)
VQModel.encode = counted
main_cache.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [file.name for file in (tmp_path / "two" / PARTS).glob("*.npz")] == ["000000000.npz"]
    with pytest.raises(UserError, match="unfinished"):
        open_codes(tmp_path / "two")

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_cache.py"]
    second = subprocess.run([*torchrun, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "1 of 4 parts are there" in second.stderr
    assert _contents(tmp_path / "two") == _contents(tmp_path / "one")


def test_damaged_part_is_made_again(images: Path, vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against taking a part over whose bytes rotted, and against encoding the sound ones again."""
    _cache(images, tmp_path / "whole", vqgan)
    unfinished = tmp_path / "unfinished"
    with monkeypatch.context() as patch:
        patch.setattr(cache_module._Builder, "_join_parts", lambda self: None)
        _cache(images, unfinished, vqgan)
    damaged = unfinished / PARTS / "000000004.npz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 1
    damaged.write_bytes(content)
    np.savez(unfinished / PARTS / "000000000.npz", codes=np.array("odd"), reasons=np.array(""))
    encoded: list[int] = []
    encode = VQModel.encode

    def counted(self: VQModel, x: torch.Tensor) -> torch.Tensor:
        encoded.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(VQModel, "encode", counted)
    _cache(images, unfinished, vqgan)
    assert sum(encoded) == 2 * 8  # two parts, plain and mirrored
    assert _contents(unfinished) == _contents(tmp_path / "whole")


def test_finished_cache_is_kept_and_verified(
    images: Path, vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against encoding a finished cache again, and against rot in it going unnoticed."""
    cache = tmp_path / "cache"
    _cache(images, cache, vqgan)
    monkeypatch.setattr(VQModel, "encode", None)
    assert _cache(images, cache, vqgan).num_images == 11
    content = bytearray((cache / "codes.npy").read_bytes())
    content[-1] ^= 1
    (cache / "codes.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"codes\.npy is missing or damaged"):
        verify_files(cache, again=True)
    with pytest.raises(UserError, match=r"codes\.npy is missing or damaged"):
        _cache(images, cache, vqgan)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named_and_left_out_on_request(images: Path, vqgan: Path, tmp_path: Path, workers: int) -> None:
    """Guards against a crash without the file's name, and against the codes or labels after it moving by one."""
    _cache(images, tmp_path / "whole", vqgan)
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    (broken / "cat" / "0002.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(UserError, match=r"0002\.png.*--skip_broken"):
        _cache(broken, tmp_path / "cache", vqgan, num_workers=workers)
    # The same folder is continued with the flag: parts without broken files stand.
    header = _cache(broken, tmp_path / "cache", vqgan, num_workers=workers, skip_broken=True)
    assert header.num_images == 10
    (reason,) = header.skipped
    assert "0002.png" in reason
    others = [i for i in range(11) if i != 2]
    whole, cached = open_codes(tmp_path / "whole"), open_codes(tmp_path / "cache")
    for got, wanted in zip(cached.get_batch(range(10)), whole.get_batch(others), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_folder_of_broken_images_only_is_refused(vqgan: Path, tmp_path: Path) -> None:
    """Guards against an empty cache that fails hours later."""
    (tmp_path / "images/cat").mkdir(parents=True)
    (tmp_path / "images/cat/a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        _cache(tmp_path / "images", tmp_path / "cache", vqgan, skip_broken=True)


def test_other_work_does_not_continue_or_replace_a_cache(images: Path, vqgan: Path, tmp_path: Path) -> None:
    """Guards against mixing codes of two sizes, tokenizers or folders, or writing into other data."""
    finished, unfinished = tmp_path / "finished", tmp_path / "unfinished"
    _cache(images, finished, vqgan)
    (unfinished / PARTS).mkdir(parents=True)
    header = json.loads((finished / "header.json").read_text())
    (unfinished / PARTS / "job.json").write_text(json.dumps(header))
    other_tokenizer = tmp_path / "other.pt"
    save_tokenizer(VQModel(load_tokenizer(vqgan).config), other_tokenizer)
    other_images = _write_images(tmp_path / "images", {"cat": 3})
    for cache in (finished, unfinished):
        with pytest.raises(UserError, match="--img_size 8, this call has --img_size 6"):
            _cache(images, cache, vqgan, img_size=6)
        with pytest.raises(UserError, match="tokenizer file"):
            _cache(images, cache, other_tokenizer)
    with pytest.raises(UserError, match=r"8 images that are not among those of .*, such as cat/0003\.png"):
        _cache(other_images, finished, vqgan)
    with pytest.raises(UserError, match="is not a cache"):
        _cache(images, images, vqgan)


def test_bad_sizes_are_refused(images: Path, vqgan: Path, tmp_path: Path) -> None:
    """Guards against starting with values that cannot work."""
    with pytest.raises(UserError, match="multiple of the tokenizer's stride, 2"):
        _cache(images, tmp_path / "cache", vqgan, img_size=7)
    with pytest.raises(UserError, match="--batch_size is 0"):
        _cache(images, tmp_path / "cache", vqgan, batch_size=0)
    with pytest.raises(UserError, match="--num_workers is -1"):
        _cache(images, tmp_path / "cache", vqgan, num_workers=-1)
    large = VQConfig(base_width=4, multipliers=(1,), res_blocks=1, z_channels=4, codebook_size=2**16 + 1, code_dim=1)
    save_tokenizer(VQModel(large), tmp_path / "large.pt")
    with pytest.raises(UserError, match="codebook of 65537"):
        _cache(images, tmp_path / "cache", tmp_path / "large.pt")
    assert not (tmp_path / "cache").exists()


def test_published_layout_is_converted(images: Path, vqgan: Path, tmp_path: Path) -> None:
    """Guards against a conversion that loses the order, the labels or the mirrored codes."""
    _cache(images, tmp_path / "direct", vqgan)
    npz = _npz_layout(images, vqgan, tmp_path / "npz")
    header = _convert(npz, tmp_path / "converted", vqgan)
    assert _contents(tmp_path / "converted") == _contents(tmp_path / "direct")
    assert header.classes == ["cat", "dog"]
    with pytest.raises(UserError, match="8 px images; --img_size is 16"):
        _convert(npz, tmp_path / "other", vqgan, img_size=16)
    np.savez(npz / "dog" / "0004.npz", indices=np.full(16, 32), indices_flip=np.zeros(16, dtype=int))
    with pytest.raises(UserError, match="code 32"):
        _convert(npz, tmp_path / "bad", vqgan)


def test_command_line(images: Path, vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a flag of main_cache.py that does not arrive, and a traceback for a user's mistake."""
    flags = [f"--vqgan_path={vqgan}", f"--cached_path={tmp_path / 'c'}", "--num_workers=0", "--device=cpu"]
    assert run(main_cache.main, *flags, f"--data_path={images}", f"--img_size={SIZE + 1}") == 2
    assert capsys.readouterr().err == "error: --img_size 9 must be a multiple of the tokenizer's stride, 2.\n"
    assert run(main_cache.main, *flags, f"--data_path={images}", f"--img_size={SIZE}", "--batch_size=2") == 0
    npz = _npz_layout(images, vqgan, tmp_path / "npz")
    capsys.readouterr()
    assert run(main_cache.main, *flags, f"--convert_from={npz}", f"--img_size={SIZE}") == 2
    assert "11 images that are not among those of" in capsys.readouterr().err  # the cache made from images


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were encoded, call by call."""
    calls: list[int] = []
    encode = VQModel.encode

    def counted(self: VQModel, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(VQModel, "encode", counted)
    return calls


def _with_more(images: Path, to: Path) -> Path:
    """16 images: a class before the others, one between them, and some at the end."""
    shutil.copytree(images, to)
    _write_images(to.with_name("more"), {"ant": 2, "cow": 2, "dog": 1})
    for path in to.with_name("more").glob("*/*.png"):
        (to / path.parent.name).mkdir(exist_ok=True)
        path.rename(to / path.parent.name / f"new{path.name}")
    return to


def test_new_images_are_added_to_a_finished_cache(
    images: Path, vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    """Guards against encoding all again, against labels of the old classes, and a cache lost on the way."""
    more, cache = _with_more(images, tmp_path / "images"), tmp_path / "cache"
    _cache(more, tmp_path / "whole", vqgan)
    _cache(images, cache, vqgan)
    before = _contents(cache)
    encoded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cache_module._Builder, "_join_parts", lambda self: None)  # killed
        _cache(more, cache, vqgan)
    assert sum(encoded) == 2 * 5
    assert _contents(cache) == before
    assert open_codes(cache).classes == ["cat", "dog"]  # as good as ever
    header = _cache(more, cache, vqgan)
    assert sum(encoded) == 2 * 5
    assert header.classes == ["ant", "cat", "cow", "dog"]
    assert _contents(cache) == _contents(tmp_path / "whole")
    assert _cache(more, cache, vqgan) == header
    assert not (cache / PARTS).exists()


def test_new_images_are_added_to_an_unfinished_cache(
    images: Path, vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    more, cache = _with_more(images, tmp_path / "images"), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(cache_module._Builder, "_join_parts", lambda self: None)
        _cache(images, cache, vqgan)
    (cache / PARTS / "000000004.npz").unlink()
    _cache(more, tmp_path / "whole", vqgan)
    encoded.clear()
    _cache(more, cache, vqgan)
    assert sum(encoded) == 2 * (5 + 4)
    assert _contents(cache) == _contents(tmp_path / "whole")


@pytest.mark.parametrize("moved", range(5))
def test_a_cache_whose_files_were_not_all_in_place_is_finished(
    images: Path, vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int], moved: int
) -> None:
    """Killed while old files make way for new ones: between them they would be a cache of wrong codes."""
    more, cache = _with_more(images, tmp_path / "images"), tmp_path / "cache"
    _cache(images, cache, vqgan)
    replace, left = os.replace, [moved]

    def stopping(source: Path, target: Path) -> None:
        if Path(source).parent.name == cache_module.NEW and Path(target).parent == cache:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            _cache(more, cache, vqgan)
    with pytest.raises(UserError, match="unfinished"):
        open_codes(cache)
    encoded.clear()
    assert _cache(more, cache, vqgan).num_images == 16
    assert not encoded
    verify_files(cache)
    assert len(open_codes(cache)) == 16


def test_repaired_images_are_added(images: Path, vqgan: Path, tmp_path: Path, encoded: list[int]) -> None:
    """Together with a new one; a cache whose list of images is the same is left alone."""
    broken, cache = tmp_path / "broken", tmp_path / "cache"
    shutil.copytree(images, broken)
    good = (broken / "cat" / "0002.png").read_bytes()
    (broken / "cat" / "0002.png").write_bytes(b"")
    _cache(broken, cache, vqgan, skip_broken=True)
    (broken / "cat" / "0002.png").write_bytes(good)
    shutil.copy(broken / "cat" / "0002.png", broken / "cat" / "9999.png")
    encoded.clear()
    header = _cache(broken, cache, vqgan)
    assert (header.num_images, header.skipped, sum(encoded)) == (12, [], 2 * 2)


def test_chosen_and_renamed_classes_are_cached(images: Path, vqgan: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("dog Hund\ncat Katze\n")
    flags = ["--vqgan_path", vqgan, "--num_workers=0", "--device=cpu", "--data_path", images, "--img_size", SIZE]
    assert run(main_cache.main, *flags, "--cached_path", tmp_path / "all", "--class_names", names) == 0
    assert (
        run(main_cache.main, *flags, "--cached_path", tmp_path / "dog", "--class_names", names, "--classes", "dog") == 0
    )
    whole, dogs = open_codes(tmp_path / "all"), open_codes(tmp_path / "dog")
    assert (whole.classes, dogs.classes, dogs.labels.tolist()) == (["Katze", "Hund"], ["Hund"], [0] * 5)
    assert torch.equal(dogs.get_batch(range(5))[0], whole.get_batch(range(6, 11))[0])
    names.write_text("dog hound\n")  # names may change later
    assert run(main_cache.main, *flags, "--cached_path", tmp_path / "all", "--class_names", names) == 0
    assert open_codes(tmp_path / "all").classes == ["cat", "hound"]


def test_a_published_command_line_runs_as_it_is(
    images: Path, vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against refusing a flag that published scripts pass, and against dropping one in silence."""
    published = (
        f"--batch_size 2 --img_size {SIZE} --vqgan_path {vqgan} --vqgan_stride 16 --vqgan_vocab_size 16384 "
        f"--data_path {images} --device cpu --seed 0 --num_workers 0 --pin_mem --no_pin_mem --world_size 1 "
        f"--local_rank -1 --dist_on_itp --dist_url env:// --cached_path {tmp_path / 'cache'}"
    )
    assert run(main_cache.main, *published.split()) == 0
    _cache(images, tmp_path / "ours", vqgan)
    assert _contents(tmp_path / "cache") == _contents(tmp_path / "ours")
    said = capsys.readouterr().err
    for flag in ("vqgan_stride", "vqgan_vocab_size", "seed", "pin_mem", "world_size", "local_rank", "dist_url"):
        assert f"note: --{flag} of the published code is not used here" in said


def test_codes_are_cached_from_an_image_archive(images: Path, vqgan: Path, tmp_path: Path) -> None:
    """Guards against a cache that mixes splits, or is continued with other photos of the same number."""
    archive = tmp_path / "photos.npz"
    files = [path.read_bytes() for path in sorted(images.glob("*/*.png"))[:6]]
    write_image_archive(archive, files, [1, 0, 1, 1, 0, 0], ["cat", "dog"], [0, 0, 1, 0, 1, 0])
    header = _cache(Path(f"{archive}:train"), tmp_path / "codes", vqgan)
    assert (header.num_images, header.classes, header.grid_size) == (4, ["cat", "dog"], 4)
    assert open_codes(tmp_path / "codes").labels.tolist() == [1, 0, 1, 0]
    assert header == _cache(Path(f"{archive}:train"), tmp_path / "codes", vqgan)
    with pytest.raises(UserError, match="list of files"):
        _cache(archive, tmp_path / "codes", vqgan)
