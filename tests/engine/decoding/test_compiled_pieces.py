"""What is compiled of decoding: whole graphs, few of them, and all before the first capture."""

from __future__ import annotations

import pytest
import torch

from engine.decoding.decoder import Decoder
from models.lpd import LPD, LPDConfig
from models.sampling import Sampling
from orders import group_sizes
from tests.helpers.compilation import captured_graphs
from tests.helpers.tiny_models import tiny_tokenizer

# First block, between two blocks, last block, embeddings of a step, draw: once for the first step, whose sizes count as
# constants, and once for all others; embeddings a third time where a group of one follows another. Keys of the noise
# and pixels: once.
GRAPHS = 2 * 5 + 1 + 1 + 1


@pytest.mark.parametrize(
    ("img_size", "steps", "sampling", "bf16"),
    [
        (256, 20, Sampling(cfg=4.8), True),
        (256, 32, Sampling(top_k=9), False),
        (512, 48, Sampling(cfg=4.8, top_p=0.9), True),
    ],
)
def test_few_whole_graphs_serve_all_steps(img_size: int, steps: int, sampling: Sampling, bf16: bool) -> None:
    """A second call compiles nothing, or a capture would fail; nor does a second decoder like the first."""
    config = LPDConfig(img_size=img_size, depth=3, embed_dim=32, num_heads=2, vocab_size=64, class_num=5)
    model, tokenizer, sizes = LPD(config).eval(), tiny_tokenizer(16, 64), group_sizes(img_size, steps)
    label, order, seed = torch.tensor([3]), torch.arange(config.num_tokens)[None], torch.tensor([7])
    counts = []
    with captured_graphs() as graphs:
        for _ in range(2):
            decoder = Decoder(model, sizes, sampling, 1, tokenizer=tokenizer, path="compiled", bf16=bf16)
            for _ in range(2):
                decoder(label, order, seed)
                counts.append(graphs())
    assert 0 < counts[0] <= GRAPHS
    assert counts == counts[:1] * 4
