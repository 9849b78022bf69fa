"""The likelihood is exact: that of the decoder's own draws, and a distribution over all images."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from engine.decoding.loop import decode, make_cache
from engine.likelihood.passes import Decoding, Sums, token_bits
from models.sampling import Sampling
from orders.config import OrderConfig
from tests.helpers.likelihood_case import model
from tests.helpers.tiny_run import CLASSES, L, V
from util.errors import UserError

SCHEDULES = [(1,) * L, (1, 3, 5, 7), (L,), (4, 1, 1, 10)]


def batch(images: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, classes and orders."""
    orders = torch.stack([torch.randperm(L) for _ in range(images)])
    return torch.randint(V, (images, L)), torch.randint(CLASSES, (images,)), orders


@pytest.mark.parametrize("sizes", SCHEDULES)
@pytest.mark.parametrize("with_class", [True, False])
def test_it_is_what_the_cached_decoder_gives_the_true_codes(sizes: tuple[int, ...], with_class: bool) -> None:
    """Every step of the decoder is fed the true codes: the probabilities that it would have drawn them with."""
    tokens, labels, orders = batch()
    net, bits = model(), []

    def true_codes(logits: torch.Tensor, _: torch.Tensor, codes: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        bits.append(-logits.log_softmax(-1).gather(2, codes[..., None])[..., 0] / math.log(2))
        return codes

    classes = labels if with_class else None
    decoded = decode(
        net, classes, orders, torch.zeros(5), sizes, Sampling(), make_cache(net, 5), true_codes,
        lambda _, orders: tokens.gather(1, orders),
    )  # fmt: skip
    assert torch.equal(decoded, tokens)
    found = token_bits(net, tokens, classes, orders, sizes)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.cat(bits, dim=1), rtol=1e-10, atol=1e-10)


def test_one_token_per_step_is_the_chain_rule() -> None:
    """The factor of each token knows the tokens before it and nothing else: later ones may be any."""
    tokens, labels, orders = batch()
    net, sizes = model(), (1,) * L
    bits = token_bits(net, tokens, labels, orders, sizes)
    for place in range(L):
        others = torch.randint(V, tokens.shape)
        known = orders[:, : place + 1]
        others.scatter_(1, known, tokens.gather(1, known))
        factor = token_bits(net, others, labels, orders, sizes)[:, place]
        torch.testing.assert_close(factor, bits[:, place], rtol=1e-10, atol=1e-10)
    changed = tokens.clone().scatter_(1, orders[:, :1], (tokens.gather(1, orders[:, :1]) + 1) % V)
    assert not torch.allclose(token_bits(net, changed, labels, orders, sizes)[:, 1:], bits[:, 1:], atol=1e-3)


def compositions(total: int) -> list[tuple[int, ...]]:
    """All group sizes that sum to this."""
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, total), n) for n in range(total))
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, total))) for cut in cuts]


@pytest.mark.parametrize("sizes", compositions(4))
def test_all_images_together_have_probability_one(sizes: tuple[int, ...]) -> None:
    """2×2 tokens of 3 codes: all 81 images, in all 24 orders, one token per step or any groups."""
    net = model(grid=2, vocab_size=3)
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for order in itertools.permutations(range(4)):
        orders = torch.tensor(order).expand(81, 4)
        for labels in (torch.ones(81, dtype=torch.int64), None):
            probabilities = torch.exp2(-token_bits(net, images, labels, orders, sizes).sum(1))
            assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
            assert probabilities.max() > 3 * probabilities.min(), "the test needs a model that tells images apart"


def test_a_group_is_drawn_independently() -> None:
    """The joint probability of a group is the product of what each of its tokens has whatever the others are."""
    net = model(grid=2, vocab_size=3)
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))
    bits = token_bits(net, images, None, torch.arange(4).expand(81, 4), (2, 2)).reshape(3, 3, 3, 3, 4)
    assert torch.allclose(bits[0, :, 0, 0, 0], bits[0, :1, 0, 0, 0].expand(3))
    assert not torch.allclose(bits[:, 0, 0, 0, 2], bits[:1, 0, 0, 0, 2].expand(3), atol=1e-3)


def test_chunks_of_logits_change_nothing() -> None:
    tokens, labels, orders = batch()
    whole = token_bits(model(), tokens, labels, orders, (1, 15))
    assert torch.equal(whole, token_bits(model(), tokens, labels, orders, (1, 15), chunk_elements=7 * V))


def test_schedules_that_do_not_fit_are_refused() -> None:
    tokens, labels, orders = batch()
    with pytest.raises(UserError, match="sum to 15"):
        token_bits(model(), tokens, labels, orders, (1, 14))


def test_sums_are_those_of_steps_and_positions() -> None:
    """By hand: two orders of each image count half each."""
    bits = torch.rand(2, 5, L, dtype=torch.float64)
    orders = torch.stack([batch()[2], batch()[2]])
    sums = Sums.of(bits, orders, (1, 3, 12))
    steps = torch.stack([part.sum(-1) for part in bits.split([1, 3, 12], dim=-1)], dim=-1).mean(0)
    torch.testing.assert_close(torch.from_numpy(sums.images), bits.sum(-1).mean(0))
    torch.testing.assert_close(torch.from_numpy(sums.steps), torch.stack([steps.sum(0), steps.square().sum(0)]))
    expected = torch.zeros(L, dtype=torch.float64)
    for k, image, place in itertools.product(range(2), range(5), range(L)):
        expected[orders[k, image, place]] += bits[k, image, place] / 2
    torch.testing.assert_close(torch.from_numpy(sums.positions), expected)


def test_keys_are_equal_for_the_same_likelihood_only() -> None:
    def decoding(order: str, *sizes: int, seed: int = 0, rho: int = 1, with_class: bool = True) -> Decoding:
        config = OrderConfig(order=order, group_sizes=sizes, repulsion_threshold=rho)
        return Decoding(config.for_grid(4, seed), sizes, with_class)

    a, b = (1, 15), (1, 3, 12)
    assert decoding("random", *a).order_key == decoding("random", *b, rho=2).order_key
    assert decoding("random", *a).order_key != decoding("random", *a, seed=1).order_key
    assert decoding("random", *a).key != decoding("random", *b).key
    assert decoding("random", *a).key != decoding("random", *a, with_class=False).key
    assert decoding("random", *a).one_by_one().key == decoding("random", *b).one_by_one().key
    assert decoding("lpd", *a).one_by_one().key != decoding("lpd", *b).one_by_one().key
    assert decoding("lpd", *a, rho=2).key != decoding("lpd", *a).key
    assert decoding("raster", *a).key != decoding("halton", *a).key
