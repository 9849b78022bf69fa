"""What a tokenizer's training reads: the same batches however they are read, and mirrored pictures."""

from __future__ import annotations

import pytest
import torch

from engine.tokenizer_training import data
from tests.helpers.tokenizer_case import CPU, Blobs


def test_a_large_data_set_is_streamed_in_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the two ways of reading showing the network different images."""
    train_set, _ = data.split(Blobs(), held_out=0.1, seed=0)

    def batches(first_step: int) -> list[torch.Tensor]:
        return list(data.read_batches(train_set, range(first_step, 7), 10, 3, 0, CPU))

    in_memory, later = batches(0), batches(5)
    monkeypatch.setattr(data, "_IN_MEMORY_BYTES", 0)
    assert len(in_memory) == 7
    for a, b in ((in_memory, batches(0)), (in_memory[5:], later), (later, batches(5))):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    every = torch.stack([train_set[i][0] for i in range(43)])
    assert torch.equal(torch.cat(in_memory)[:43].unique(dim=0), every.unique(dim=0))


def test_flip_mirrors_left_and_right_only() -> None:
    plain = Blobs().images
    flipped = data.flip_half(plain)
    mirrored = [torch.equal(a, b.flip(1)) and not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)
