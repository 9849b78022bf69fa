"""Cached parallel decoding: equal to the masked training pass, every position once, draws tied to seeds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import engine.decoding.loop
from engine.generate import generate
from models import build_model
from models.lpd import LPD
from models.sampling import exponential_noise, filter_logits, guidance_weights, guide, noise_keys, sample
from tests.helpers.tiny_models import far_from_initialisation
from util.errors import UserError

V = 11


def small_model(grid: int = 4) -> LPD:
    torch.manual_seed(3)
    model = build_model("lpd_debug", img_size=16 * grid, class_num=5, vocab_size=V).double().eval()
    return far_from_initialisation(model, std=0.5)


def random_schedule(L: int, generator: torch.Generator) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < L:
        sizes.append(int(torch.randint(1, min(6, L - sum(sizes)) + 1, (), generator=generator)))
    return sizes


@pytest.mark.parametrize("trial", range(8))
def test_cached_decode_is_the_masked_training_pass(trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 the logits of every decoding step equal those of one training pass over the finished image.

    Catches a cache that keeps query rows, a shifted group, a mask that leaks, and guidance halves that mix.
    """
    generator = torch.Generator().manual_seed(trial)
    grid, B = 3 + trial % 3, 1 + trial % 4
    L = grid**2
    model = small_model(grid)
    orders = torch.rand(B, L, generator=generator).argsort(dim=1)
    sizes = random_schedule(L, generator)
    labels = None if trial == 5 else torch.randint(5, (B,), generator=generator)
    cfg = 1.0 if trial in (0, 5) else 2.5
    cfg_schedule = "linear" if trial % 2 else "constant"

    recorded = []

    def recording_sample(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        recorded.append(logits)
        return sample(logits, *args)

    monkeypatch.setattr(engine.decoding.loop, "sample", recording_sample)
    tokens = generate(model, labels, orders, sizes, cfg, cfg_schedule)
    assert [logits.shape[1] for logits in recorded] == sizes

    with torch.no_grad():
        expected = model(tokens, labels, orders, sizes)
        if cfg != 1.0:
            weights = guidance_weights(cfg, cfg_schedule, L)
            expected = guide(expected, model(tokens, None, orders, sizes), weights)
    torch.testing.assert_close(torch.cat(recorded, dim=1), expected, atol=1e-10, rtol=1e-10)


def test_every_position_is_decoded_exactly_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feeding codes that name their index in the order shows each raster position written once, in its place."""
    model, L = build_model("lpd_debug", img_size=64, class_num=5, vocab_size=16).eval(), 16
    orders = torch.stack([torch.randperm(L, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    counter = iter(range(L))

    def next_indices(logits: torch.Tensor, *args: object) -> torch.Tensor:
        return torch.tensor([next(counter) for _ in range(logits.shape[1])]).expand(len(logits), -1)

    monkeypatch.setattr(engine.decoding.loop, "sample", next_indices)
    tokens = generate(model, torch.tensor([0, 1, 2]), orders, [1, 4, 5, 6], cfg=2.0)
    assert torch.equal(tokens.gather(1, orders), torch.arange(L).expand(3, -1))


def test_draws_follow_the_seed_and_nothing_else_in_the_batch() -> None:
    model = small_model()
    orders = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    labels, seeds = torch.arange(6) % 5, torch.arange(100, 106)
    whole = generate(model, labels, orders, [1, 3, 5, 7], cfg=1.5, seeds=seeds)
    alone = [
        generate(model, labels[i : i + 1], orders[i : i + 1], [1, 3, 5, 7], cfg=1.5, seeds=seeds[i : i + 1])
        for i in range(6)
    ]
    assert torch.equal(whole, torch.cat(alone))
    assert not torch.equal(whole, generate(model, labels, orders, [1, 3, 5, 7], cfg=1.5, seeds=seeds + 1))


def test_default_seeds_follow_torchs_generator() -> None:
    model, orders, labels = small_model(), torch.arange(16).repeat(2, 1), torch.tensor([1, 1])
    first, second = (generate(model, labels, orders, [1, 15]) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    first = generate(model, labels, orders, [1, 15])
    torch.manual_seed(7)
    assert torch.equal(first, generate(model, labels, orders, [1, 15]))


def test_float32_and_bf16_autocast_give_nearly_the_codes_of_float64() -> None:
    """The noise is the same, so that a code differs only where rounding decides between two."""
    model, orders, seeds = small_model(), torch.arange(16).repeat(64, 1), torch.arange(64)
    decode = partial(generate, labels=seeds % 5, orders=orders, group_sizes=[1, 3, 5, 7], cfg=2.0, seeds=seeds)
    expected = decode(model)
    assert (decode(model.float()) == expected).float().mean() > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        assert (decode(model) == expected).float().mean() > 0.9


def test_noise_is_standard_exponential_and_independent() -> None:
    """Mean, variance and tails of Exp(1), no correlation between neighbouring codes, positions or seeds."""
    noise = exponential_noise(noise_keys(torch.arange(20), torch.arange(25).repeat(20, 1)), 1000).double()
    n = noise.numel()
    assert noise.min() > 0
    assert noise.mean().item() == pytest.approx(1.0, abs=5 / n**0.5)
    assert noise.var().item() == pytest.approx(1.0, abs=5 * (8 / n) ** 0.5)
    for level in (0.001, 0.1, 1.0, 5.0):
        p = 1 - torch.exp(torch.tensor(-level)).item()
        assert (noise < level).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)
    for dim in range(3):
        length = noise.shape[dim] - 1
        a, b = noise.narrow(dim, 0, length) - 1, noise.narrow(dim, 1, length) - 1
        assert (a * b).mean().abs().item() < 5 / a.numel() ** 0.5


def test_noise_does_not_depend_on_step_or_neighbours() -> None:
    seeds, positions = torch.tensor([5, 2**62, -3]), torch.arange(12).repeat(3, 1)
    whole = exponential_noise(noise_keys(seeds, positions), 50)
    assert torch.equal(whole[1:2, 4:7], exponential_noise(noise_keys(seeds[1:2], positions[1:2, 4:7]), 50))


def test_sample_draws_from_the_distribution() -> None:
    """Empirical frequencies equal the softmax at a temperature, within sampling error."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -8.0])
    n = 40000
    noise = exponential_noise(noise_keys(torch.arange(n), torch.zeros(n, 1, dtype=torch.int64)), 5)
    for temperature in (1.0, 2.0):
        frequencies = sample(logits.expand(n, 1, 5), noise, temperature).flatten().bincount(minlength=5) / n
        torch.testing.assert_close(frequencies, (logits / temperature).softmax(0), atol=5 * 0.5 / n**0.5, rtol=0)


def test_top_k_and_top_p_keep_what_they_should() -> None:
    logits = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()[..., [2, 0, 3, 1]]
    kept = lambda **options: filter_logits(logits, **options).isfinite()[0, 0].tolist()  # noqa: E731
    assert kept() == [True] * 4
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.5) == [False, True, False, False]
    assert kept(top_p=0.6) == [False, True, False, True]
    assert kept(top_p=1e-9) == [False, True, False, False]
    assert kept(top_k=1, top_p=0.9) == [False, True, False, False]


def test_linear_guidance_grows_within_a_group() -> None:
    torch.testing.assert_close(guidance_weights(5.0, "linear", 4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(guidance_weights(5.0, "constant", 2), torch.tensor([5.0, 5.0]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cfg": 0.5}, "cfg is 0.5"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"cfg_schedule": "square"}, "cfg_schedule is 'square'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 12}, "top_k is 12"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"labels": torch.tensor([0, 5])}, "label 5"),
        ({"labels": torch.tensor([0])}, "labels have shape"),
        ({"labels": None, "cfg": 2.0}, "no labels"),
        ({"group_sizes": [1, 14]}, "sum to 15"),
        ({"group_sizes": [1, 0, 15]}, "sum to 16; they must be positive"),
        ({"orders": torch.arange(15).repeat(2, 1)}, "orders have shape"),
        ({"orders": torch.zeros(2, 16, dtype=torch.int64)}, "row 0 .* not a permutation"),
        ({"seeds": torch.arange(3)}, "seeds have shape"),
    ],
)
def test_bad_input_is_named(options: dict, named: str) -> None:
    inputs = {"labels": torch.tensor([0, 1]), "orders": torch.arange(16).repeat(2, 1), "group_sizes": [1, 15]}
    with pytest.raises(UserError, match=named):
        generate(small_model(), **(inputs | options))


def test_training_mode_is_refused() -> None:
    with pytest.raises(UserError, match="training mode"):
        generate(small_model().train(), torch.tensor([0]), torch.arange(16)[None], [1, 15])


def test_loss_of_a_copied_image_goes_down() -> None:
    """A few steps of plain gradient descent reduce the loss: the head, queries and positions get gradients."""
    model = build_model("lpd_debug", img_size=64, class_num=5, vocab_size=V)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tokens, labels, orders = torch.randint(V, (4, 16)), torch.arange(4), torch.arange(16).repeat(4, 1)
    losses = []
    for _ in range(20):
        logits = model(tokens, labels, orders, [1, 3, 5, 7])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, orders).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.gpu
def test_gpu_decodes_the_same_codes_as_the_cpu() -> None:
    """The noise has the same bits on every device, so in float64 the codes agree."""
    model = small_model()
    orders = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    labels, seeds = torch.arange(6) % 5, torch.arange(6)
    expected = generate(model, labels, orders, [1, 3, 5, 7], cfg=1.5, seeds=seeds)
    tokens = generate(model.cuda(), labels, orders, [1, 3, 5, 7], cfg=1.5, seeds=seeds)
    assert torch.equal(tokens.cpu(), expected)


@pytest.mark.gpu
def test_gpu_training_pass_equals_the_cpu() -> None:
    model = small_model()
    inputs = torch.randint(V, (2, 16)), torch.tensor([0, 3]), torch.arange(16).repeat(2, 1)
    expected = model(*inputs, [1, 3, 5, 7])
    logits = model.cuda()(*(tensor.cuda() for tensor in inputs), [1, 3, 5, 7])
    torch.testing.assert_close(logits.cpu(), expected)
