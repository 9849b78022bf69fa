"""Caches of codes as training opens them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from util.data import codes as codes_module
from util.data.codes import CacheHeader, CodeDataset, open_codes, verify_files, write_codes
from util.data.loading import whole_batch
from util.data.sampler import GlobalBatchSampler
from util.errors import UserError
from util.files import sha256

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
        with pytest.raises(UserError, match=r"codes\.npy .*damaged"):
            open_codes(cache)
        np.save(cache / "codes.npy", PLAIN[1:])
        with pytest.raises(UserError, match=r"codes\.npy .*holds uint16 \(9, 16\), not uint16 \(10, 16\)"):
            open_codes(cache)
        (cache / "codes.npy").write_bytes(whole)
        for changes in ({"version": 2}, {"format": "other"}, {"surprise": 1}, {"num_images": "3"}):
            _write_header(cache, **changes)
            with pytest.raises(UserError, match=r"header\.json is"):
                open_codes(cache)
        (cache / "header.json").unlink()
        (cache / ".parts").mkdir()
        with pytest.raises(UserError, match="unfinished"):
            open_codes(cache)
        with pytest.raises(UserError, match="nowhere is not a folder"):
            open_codes(tmp_path / "nowhere")

    def test_labels_outside_the_classes_are_refused(self, cache: Path) -> None:
        """Guards against an index error deep in the embedding, and against training on a class that is not there."""
        for label in (-1, 2):
            np.save(cache / "labels.npy", np.where(np.arange(N) == 3, label, LABELS))
            with pytest.raises(UserError, match=r"labels\.npy holds labels outside the 2 classes"):
                open_codes(cache)

    def test_changed_caches_are_noticed(self, tmp_path: Path) -> None:
        """Guards against training on codes, labels or class names that have changed, however valid they look."""
        write_codes(tmp_path, PLAIN, FLIP, LABELS, HEADER)
        header = verify_files(tmp_path)
        assert header.files.keys() == {"codes.npy", "codes_flip.npy", "labels.npy"}
        for name in header.files:
            whole = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            os.utime(tmp_path / name, ns=(0, 0))
            with pytest.raises(UserError, match=rf"{name} is missing or damaged"):
                verify_files(tmp_path)
            (tmp_path / name).write_bytes(whole)
        verify_files(tmp_path)
        text = (tmp_path / "header.json").read_text()
        (tmp_path / "header.json").write_text(text.replace("cat", "cap"))
        with pytest.raises(UserError, match=r"header\.json is damaged or has been changed"):
            open_codes(tmp_path)

    def test_verified_files_are_remembered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Guards against reading gigabytes at every start, and against trusting times where it must not."""
        read: list[str] = []
        write_codes(tmp_path, PLAIN, FLIP, LABELS, HEADER)

        def counted(path: Path) -> str:
            read.append(path.name)
            return sha256(path)

        monkeypatch.setattr(codes_module, "sha256", counted)
        verify_files(tmp_path, remember=False)
        verify_files(tmp_path)
        assert len(read) == 6
        verify_files(tmp_path)
        assert len(read) == 6
        os.utime(tmp_path / "labels.npy", ns=(0, 0))
        (tmp_path / ".verified.json").write_text((tmp_path / ".verified.json").read_text())
        verify_files(tmp_path)
        assert read[6:] == ["labels.npy"]
        verify_files(tmp_path, again=True)
        assert len(read) == 10
        (tmp_path / ".verified.json").write_text("[[[")
        verify_files(tmp_path)
        assert len(read) == 13

    def test_damaged_npz_files_are_named(self, npz: Path) -> None:
        """Guards against a traceback of numpy for a file that does not hold codes."""
        dataset: CodeDataset = open_codes(npz)
        file = npz / "cat/3.npz"
        for damage, sentence in (
            (lambda: file.write_bytes(b"PK no archive"), r"3\.npz is truncated or damaged"),
            (lambda: np.savez(file, indices=PLAIN[0]), r"3\.npz has no array"),
            (lambda: np.savez(file, indices=np.zeros(L), indices_flip=np.zeros(L)), r"3\.npz must hold two integer"),
            (lambda: np.savez(file, indices=PLAIN[0, :9], indices_flip=FLIP[0, :9]), r"3\.npz holds 9 codes"),
        ):
            damage()
            with pytest.raises(UserError, match=sentence):
                dataset.get_batch([3])
