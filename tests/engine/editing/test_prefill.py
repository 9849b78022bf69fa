"""Known codes in the cache: seen as training has it, kept, and the rest decoded as the masked training pass says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import engine.decoding.decoder
import engine.decoding.loop
from engine.decoding.decoder import Decoder
from engine.decoding.loop import decode, make_cache
from engine.generate import generate
from models import build_model
from models.lpd import LPD
from models.sampling import Sampling, guidance_weights, guide, sample
from tests.helpers.tiny_models import far_from_initialisation
from tests.helpers.visibility import brute_force_visibility
from util.errors import UserError

V, CLASSES, L = 11, 5, 16
KNOWN = (1, 2, 7, 15, 16)  # how many codes


def small_model() -> LPD:
    torch.manual_seed(3)
    model = build_model("lpd_debug", img_size=16, stride=4, class_num=CLASSES, vocab_size=V).double().eval()
    return far_from_initialisation(model, std=0.5)


def batch(B: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, orders, seeds, codes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (B,), generator=generator)
    orders = torch.rand(B, L, generator=generator).argsort(dim=1)
    return labels, orders, torch.arange(B) + 100 * seed, torch.randint(V, (B, L), generator=generator)


def sizes_of(known: int) -> list[int]:
    """The known codes, then steps of any sizes."""
    sizes, size = [known], 1
    while sum(sizes) < L:
        sizes.append(min(size, L - sum(sizes)))
        size += 2
    return sizes


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_prefilled_decode_is_the_masked_training_pass(known: int, cfg: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 every step's logits are those of one training pass in which the known codes are the first group.

    Catches a class token that sees codes, known codes that do not see each other, and a shift of the groups.
    """
    model, (labels, orders, seeds, codes) = small_model(), batch(3, known)
    recorded: list[torch.Tensor] = []

    def recording_sample(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        recorded.append(logits)
        return sample(logits, *rest)

    monkeypatch.setattr(engine.decoding.loop, "sample", recording_sample)
    sizes = sizes_of(known)
    tokens = generate(model, labels, orders, sizes, cfg, seeds=seeds, codes=codes)
    first = orders[:, :known]
    assert torch.equal(tokens.gather(1, first), codes.gather(1, first))
    assert [logits.shape[1] for logits in recorded] == sizes[1:]
    if known == L:
        return
    with torch.no_grad():
        expected = model(tokens, labels, orders, sizes)
        if cfg != 1.0:
            expected = guide(expected, model(tokens, None, orders, sizes), guidance_weights(cfg, "linear", L))
    torch.testing.assert_close(torch.cat(recorded, dim=1), expected[:, known:], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("known", [1, 6])
def test_visibility_of_the_prefill_row_by_row(known: int) -> None:
    """A row's second layer changes with exactly the rows that it sees: the class token with itself alone, a known code
    with the class token and all known codes, and nothing with a query."""
    model, (_, orders, seeds, codes) = small_model(), batch(1, 1)
    sizes = sizes_of(known)

    def rows(labels: torch.Tensor, codes: torch.Tensor, orders: torch.Tensor = orders) -> torch.Tensor:
        """Keys and values of the second layer, (1 + K, everything)."""
        cache = make_cache(model, 1)
        with torch.inference_mode():
            decode(model, labels, orders, seeds, sizes, Sampling(top_k=1), cache, codes_BL=codes)
        return cache.key_values[1, :, 0, :, : 1 + known].transpose(0, 2).flatten(1)

    label = torch.tensor([0])
    before = rows(label, codes)
    seen = brute_force_visibility(sizes)[: 1 + known, : 1 + known]
    for column in range(1 + known):
        if column == 0:
            after = rows(label + 1, codes)
        else:
            changed, cell = codes.clone(), orders[0, column - 1]
            changed[0, cell] = (changed[0, cell] + 1) % V
            after = rows(label, changed)
        assert torch.equal((before != after).any(dim=1), seen[:, column]), column
    unknown = orders.clone()
    unknown[0, known:] = orders[0, known:].flip(0)
    assert torch.equal(rows(label, codes, unknown), before)


@pytest.mark.parametrize(
    "path", ["plain", "packed", "compiled pieces", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_every_path_keeps_known_codes_and_draws_each_other_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes as the plain loop's, in batches of one and three, guided and not; in place of codes that are not
    known anything may be given."""
    if path == "compiled pieces":  # as they stand, without the compiler
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    drawn = []
    draw = engine.decoding.loop.draw_codes

    def counting(logits: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        drawn.append(keys)
        return draw(logits, weights, keys, sampling)

    if path != "compiled":
        monkeypatch.setattr(engine.decoding.decoder, "draw_codes", counting)
    model = small_model().float()
    cases = [(B, known, cfg) for B, cfg in ((1, 1.0), (3, 3.0)) for known in KNOWN]
    for B, known, cfg in cases[-2:] if path == "compiled" else cases:
        sizes = sizes_of(known)
        decoder = Decoder(model, sizes, Sampling(cfg=cfg), B, path=path.split()[0], with_known=True)
        for seed in range(2):
            labels, orders, seeds, codes = batch(B, seed)
            drawn.clear()
            result = decoder(labels, orders, seeds, codes).codes
            first, others = orders[:, :known], orders[:, known:]
            assert torch.equal(result.gather(1, first), codes.gather(1, first))
            assert torch.equal(result, generate(model, labels, orders, sizes, cfg, seeds=seeds, codes=codes))
            forgotten = codes.scatter(1, others, 0)
            assert torch.equal(result, decoder(labels, orders, seeds, forgotten).codes)
            if path != "compiled" and known < L:
                keys = torch.cat(drawn[: len(sizes) - 1], dim=1)
                assert keys.shape == (B, L - known)
                assert all(len(set(row)) == L - known for row in keys.tolist())


def test_the_first_group_of_an_ordinary_decode_may_be_given() -> None:
    """Kept, it leads to the same picture: the rest sees it as it did."""
    model, (labels, orders, seeds, _) = small_model(), batch(4, 5)
    sizes = [3, 4, 9]
    whole = generate(model, labels, orders, sizes, 2.0, seeds=seeds)
    assert torch.equal(generate(model, labels, orders, sizes, 2.0, seeds=seeds, codes=whole), whole)


def test_mistakes_are_named() -> None:
    model, (labels, orders, seeds, codes) = small_model(), batch(2, 0)
    with pytest.raises(UserError, match=r"known codes have shape \(2, 15\)"):
        generate(model, labels, orders, [3, 13], seeds=seeds, codes=codes[:, :15])
    with pytest.raises(UserError, match="code 11 is out of range; the model has 0 to 10"):
        generate(model, labels, orders, [3, 13], seeds=seeds, codes=codes + V - codes.max())
    decoder = Decoder(model, [3, 13], Sampling(), 2, with_known=True)
    with pytest.raises(UserError, match="known codes are given to a decoder made without them, or missing"):
        decoder(labels, orders, seeds)
    with pytest.raises(UserError, match="known codes have shape"):
        decoder(labels, orders, seeds, codes[:1])
    with pytest.raises(UserError, match="known codes are given to a decoder made without them"):
        Decoder(model, [3, 13], Sampling(), 2)(labels, orders, seeds, codes)
