"""Caches of codes as training opens them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from util.data.codes import CacheHeader, CodeDataset, open_codes
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
