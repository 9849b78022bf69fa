"""Image folders, caches of codes as training opens them, and the order of samples."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from util.data.codes import CacheHeader, CodeDataset, open_codes
from util.data.images import ImageFolder
from util.data.loading import whole_batch
from util.data.sampler import GlobalBatchSampler
from util.errors import UserError

N, L, V = 10, 16, 32
RNG = np.random.default_rng(0)
PLAIN, FLIP = RNG.integers(0, V, (2, N, L)).astype(np.uint16)
LABELS = np.repeat(np.arange(2), N // 2)
HEADER = CacheHeader(
    img_size=64,
    grid_size=4,
    num_images=N,
    classes=["cat", "dog"],
    tokenizer_sha256="ab" * 32,
    vocab_size=V,
    max_code=int(max(PLAIN.max(), FLIP.max())),
    crop="adm_center",
    source="images",
    source_sha256="cd" * 32,
    skipped=[],
    files={},
)


def _image(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir()
    np.save(path / "codes.npy", PLAIN)
    np.save(path / "codes_flip.npy", FLIP)
    np.save(path / "labels.npy", LABELS)
    _write_header(path)
    return path


def _write_header(cache: Path, **changes: object) -> None:
    (cache / "header.json").write_text(json.dumps(dataclasses.asdict(HEADER) | changes))


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    cache = tmp_path / "npz"
    for i in range(N):
        file = cache / HEADER.classes[LABELS[i]] / f"{i}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, indices=PLAIN[i].astype(np.int64).reshape(1, L), indices_flip=FLIP[i].astype(np.int32))
    return cache


class TestImageFolder:
    def test_labels_follow_sorted_folders_and_files_are_found(self, tmp_path: Path) -> None:
        """Guards against labels in the file system's order, capital extensions, nested or hidden files."""
        for name in ("n02/b.JPEG", "n02/deep/er/a.png", "n01/z.webp", "n10/x.bmp"):
            _image(tmp_path / name)
        _image(tmp_path / "n01/._z.png")
        _image(tmp_path / ".cache/x.png")
        (tmp_path / "n01/notes.txt").write_text("no image")
        folder = ImageFolder(tmp_path, 8)
        assert folder.classes == ["n01", "n02", "n10"]
        assert folder.paths == ["n01/z.webp", "n02/b.JPEG", "n02/deep/er/a.png", "n10/x.bmp"]
        assert folder.labels.tolist() == [0, 1, 1, 2]

    def test_items_are_cropped_bytes(self, tmp_path: Path) -> None:
        """Guards against floats, channels first or an uncropped picture at the border of the module."""
        _image(tmp_path / "a/x.png", (1, 2, 3), size=(40, 16))
        image, label = ImageFolder(tmp_path, 8)[0]
        assert (image.dtype, image.shape, label) == (torch.uint8, (8, 8, 3), 0)
        assert image.unique(dim=0).shape[0] == 1
        assert image[0, 0].tolist() == [1, 2, 3]

    def test_broken_image_is_named_or_replaced_by_the_next(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Guards against a crash without the name, a batch that shrinks, and a replacement with a foreign label."""
        _image(tmp_path / "a/1.png", (1, 1, 1))
        (tmp_path / "a/2.png").write_bytes(b"")
        (tmp_path / "a/3.png").write_bytes(b"\x89PNG")
        _image(tmp_path / "b/4.png", (4, 4, 4))
        (tmp_path / "b/5.png").write_bytes(b"broken")
        with pytest.raises(UserError, match=r"2\.png"):
            ImageFolder(tmp_path, 8)[1]
        folder = ImageFolder(tmp_path, 8, skip_broken=True)
        found = [(int(image.float().mean()), label) for image, label in (folder[i] for i in range(5))]
        assert found == [(1, 0), (4, 1), (4, 1), (4, 1), (1, 0)]
        assert "2.png" in caplog.text

    def test_only_broken_images(self, tmp_path: Path) -> None:
        """Guards against an endless search for a readable image."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a/1.png").write_bytes(b"")
        with pytest.raises(UserError, match="none of the 1 images"):
            ImageFolder(tmp_path, 8, skip_broken=True)[0]

    def test_unfit_folders_are_named(self, tmp_path: Path) -> None:
        """Guards against labels shifted by an empty class, and an empty data set that fails late."""
        with pytest.raises(UserError, match=r"missing is not a folder"):
            ImageFolder(tmp_path / "missing", 8)
        _image(tmp_path / "flat/x.png")
        with pytest.raises(UserError, match=r"flat has no class folders"):
            ImageFolder(tmp_path / "flat", 8)
        (tmp_path / "set/a").mkdir(parents=True)
        with pytest.raises(UserError, match=r"set hold no images"):
            ImageFolder(tmp_path / "set", 8)
        _image(tmp_path / "set/b/x.png")
        with pytest.raises(UserError, match=r"set/a holds no images"):
            ImageFolder(tmp_path / "set", 8)


class TestCodes:
    @pytest.mark.parametrize("layout", ["cache", "npz"])
    def test_both_layouts_give_the_same_batches(self, layout: str, request: pytest.FixtureRequest) -> None:
        """Guards against rows, mirrored codes or labels mixed up, and against types or shapes that differ by layout."""
        dataset = open_codes(request.getfixturevalue(layout))
        assert (len(dataset), dataset.num_tokens, dataset.grid_size) == (N, L, 4)
        assert dataset.classes == ["cat", "dog"]
        rows = [7, 0, 7, 3]
        for got, wanted in zip(dataset.get_batch(rows), (PLAIN, FLIP, LABELS), strict=True):
            assert got.dtype == torch.int64
            assert got.tolist() == wanted[rows].tolist()
        codes, _, label = dataset[9]
        assert (codes.tolist(), int(label)) == (PLAIN[9].tolist(), 1)

    @pytest.mark.parametrize("context", ["fork", "spawn"])
    def test_loader_with_workers(self, cache: Path, context: str) -> None:
        """Guards against a batch collated twice."""
        dataset = open_codes(cache)
        sampler = GlobalBatchSampler(N, 4, rank=0, world_size=1, seed=1, num_steps=4)
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=1, collate_fn=whole_batch, multiprocessing_context=context
        )
        for (codes, codes_flip, labels), rows in zip(loader, sampler, strict=True):
            assert codes.tolist() == PLAIN[rows].tolist()
            assert codes_flip.tolist() == FLIP[rows].tolist()
            assert labels.tolist() == LABELS[rows].tolist()

    def test_disagreement_is_refused(self, cache: Path) -> None:
        """Guards against training on codes of another tokenizer or size."""
        with pytest.raises(UserError, match="64 px, not 256 px"):
            open_codes(cache, img_size=256)
        with pytest.raises(UserError, match="another tokenizer"):
            open_codes(cache, tokenizer_hash="ef" * 32)
        assert open_codes(cache, img_size=64, tokenizer_hash="ab" * 32)

    @pytest.mark.parametrize("layout", ["cache", "npz"])
    def test_code_outside_the_codebook_is_refused_when_read(self, layout: str, request: pytest.FixtureRequest) -> None:
        """Guards against an index error, or silence, deep in the embedding."""
        cache = request.getfixturevalue(layout)
        codes = PLAIN.copy()
        codes[5, 3] = V
        if layout == "cache":
            np.save(cache / "codes.npy", codes)
        else:
            np.savez(cache / "dog/5.npz", indices=codes[5], indices_flip=FLIP[5])
        dataset = open_codes(cache)
        dataset.vocab_size = V
        dataset.get_batch([4, 6])
        with pytest.raises(UserError, match=f"sample 5 of .* code {V}; the codebook has codes 0 to {V - 1}"):
            dataset.get_batch([4, 5])

    def test_negative_code_is_refused(self, npz: Path) -> None:
        """Guards against -1 wrapping around to the last entry."""
        np.savez(npz / "dog/5.npz", indices=np.full(L, -1), indices_flip=np.zeros(L, dtype=int))
        with pytest.raises(UserError, match="code -1"):
            open_codes(npz).get_batch([5])

    def test_damaged_caches_are_refused(self, cache: Path, tmp_path: Path) -> None:
        """Guards against reading a truncated, foreign, newer or unfinished cache."""
        whole = (cache / "codes.npy").read_bytes()
        (cache / "codes.npy").write_bytes(whole[:-1])
        with pytest.raises(UserError, match=r"codes\.npy is missing or damaged"):
            open_codes(cache)
        np.save(cache / "codes.npy", PLAIN[1:])
        with pytest.raises(UserError, match=r"codes\.npy holds uint16 \(9, 16\)"):
            open_codes(cache)
        (cache / "codes.npy").write_bytes(whole)
        for changes in ({"version": 2}, {"format": "other"}, {"surprise": 1}):
            _write_header(cache, **changes)
            with pytest.raises(UserError, match=r"header\.json is"):
                open_codes(cache)
        (cache / "header.json").unlink()
        (cache / ".parts").mkdir()
        with pytest.raises(UserError, match="unfinished"):
            open_codes(cache)
        with pytest.raises(UserError, match="nowhere is not a folder"):
            open_codes(tmp_path / "nowhere")

    def test_damaged_npz_files_are_named(self, npz: Path) -> None:
        """Guards against a traceback of numpy for a file that does not hold codes."""
        dataset: CodeDataset = open_codes(npz)
        file = npz / "cat/3.npz"
        for damage, sentence in (
            (lambda: file.write_bytes(b"PK no archive"), r"3\.npz is not a readable file"),
            (lambda: np.savez(file, indices=PLAIN[0]), r"3\.npz has no array"),
            (lambda: np.savez(file, indices=np.zeros(L), indices_flip=np.zeros(L)), r"3\.npz must hold two integer"),
            (lambda: np.savez(file, indices=PLAIN[0, :9], indices_flip=FLIP[0, :9]), r"3\.npz holds 9 codes"),
        ):
            damage()
            with pytest.raises(UserError, match=sentence):
                dataset.get_batch([3])


def _steps(world_size: int, start: int, count: int, size: int = 23, batch: int = 8) -> list[list[int]]:
    """The global batches that ``world_size`` processes see together, as each process's shares in rank order."""
    shares = [
        list(GlobalBatchSampler(size, batch, rank, world_size, seed=3, start_step=start, num_steps=count))
        for rank in range(world_size)
    ]
    return [list(itertools.chain(*step)) for step in zip(*shares, strict=True)]


class TestGlobalBatchSampler:
    def test_every_world_size_sees_the_same_batches(self) -> None:
        """Guards against a run whose data change with the number of GPUs."""
        assert _steps(1, 0, 7) == _steps(2, 0, 7) == _steps(4, 0, 7) == _steps(8, 0, 7)

    @pytest.mark.parametrize("start", [1, 2, 3, 5])
    def test_a_run_resumes_where_it_stopped(self, start: int) -> None:
        """Guards against repeated or lost samples after a restart in mid-epoch or at its border."""
        assert _steps(2, start, 7 - start) == _steps(2, 0, 7)[start:]

    def test_epochs_are_different_permutations(self) -> None:
        """Guards against repeated samples within an epoch, the same order every epoch, and a kept incomplete batch."""
        first, second = (list(itertools.chain(*_steps(1, start, 2))) for start in (0, 2))
        assert len(set(first)) == len(first) == 16
        assert len(set(second)) == len(second) == 16
        assert first != second
        assert set(first) | set(second) <= set(range(23))

    def test_yields_for_ever_by_default(self) -> None:
        """Guards against training that stops at the end of an epoch."""
        sampler = GlobalBatchSampler(5, 5, 0, 1, seed=0)
        assert sampler.steps_per_epoch == 1
        assert len(list(itertools.islice(sampler, 100))) == 100

    def test_impossible_batches_are_refused(self) -> None:
        """Guards against an epoch of no steps, or processes with unequal shares."""
        with pytest.raises(UserError, match=r"7 samples.*to at most 3"):
            GlobalBatchSampler(7, 8, 0, 2, seed=0)
        with pytest.raises(UserError, match="multiple of the 2 process"):
            GlobalBatchSampler(100, 9, 0, 2, seed=0)
        with pytest.raises(UserError, match="global batch 0"):
            GlobalBatchSampler(100, 0, 0, 1, seed=0)
