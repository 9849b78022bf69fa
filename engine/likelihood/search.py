"""Group sizes and thresholds under which a model finds images likeliest, at a given number of steps.

The search starts from the published schedule and replaces it by what is likelier: first other thresholds for all steps,
then other group sizes (families of curves, and the best sizes for tabulated costs, by dynamic programming), then
thresholds that change along the steps and tokens moved from one step to another, at random, until the time is over.
Candidates are raced by successive halving: all see the same images in orders from the same random numbers, the worse
half drops out, the rest sees twice as many. Whatever comes out was chosen for looking good on these images: only other
images can tell how much better it is.

Shape legend: `L` tokens of an image, `S` steps.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engine.likelihood.measure import Meter
from engine.likelihood.passes import Decoding
from engine.likelihood.report import mean
from orders.draw import LPD_KINDS, Orders, OrderSpec
from util.dist import Dist

logger = logging.getLogger(__name__)

# What a candidate needs beside it: nothing, and nearness does not count; a corner; an edge; both; two edges.
PROXIMITIES = (None, 0.7, 1.0, 1.7, 2.0)
FIRST_RUNG, LAST_RUNG = 32, 512  # images that candidates see before the first, and at most before the last decision
SHAPES = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 2.6, 3.0)  # see shaped_sizes
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # group sizes whose costs are tabulated
MOVES = 15  # of a round of random changes
WITHOUT_GAIN = 12  # rounds of random changes after which the search ends


class OutOfTime(Exception):
    """The budget is used up."""


class Samples:
    """Likelihoods of candidates on samples 0, 1, …: sample j is image j mod N, in its order number j.

    All candidates see the same samples and random numbers. What was computed is kept: a number per sample.

    Args:
        images: numbers of the images to search on.
        end: when to stop, on the clock of ``time.monotonic``; :class:`OutOfTime` after it.
        progress: shows the seconds since the beginning.
    """

    def __init__(
        self, meter: Meter, images: NDArray[np.int64], dist: Dist, end: float, progress: tqdm | None = None
    ) -> None:
        self.meter, self.images, self.dist, self.end, self.progress = meter, images, dist, end, progress
        self.begun, self.passes = time.monotonic(), 0
        self._known: dict[OrderSpec, NDArray[np.float64]] = {}

    def bits(self, spec: OrderSpec, count: int) -> NDArray[np.float64]:
        """Bits per token of the first ``count`` samples."""
        known = self._known.get(spec, np.empty(0))
        if len(known) < count:
            known = np.concatenate([known, self._measure(spec, len(known), count)[0]])
            self._known[spec] = known
        return known[:count]

    def step_bits(self, spec: OrderSpec, count: int) -> NDArray[np.float64]:
        """Mean bits of each step, (S,)."""
        return self._measure(spec, 0, count)[1] / count

    def _measure(self, spec: OrderSpec, start: int, stop: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bits per token of samples start … stop − 1, and the sums over them of the bits of each step.

        The samples are divided among the processes, which all get everything.
        """
        dist, size = self.dist, self.meter.settings.batch_size * self.dist.world_size
        bits, steps = np.empty(stop - start), np.zeros(len(spec.group_sizes))
        for first in range(start, stop, size):
            if dist.broadcast(time.monotonic() > self.end):
                raise OutOfTime
            turn = np.arange(first, min(first + size, stop))
            gathered = dist.gather(self._sums(spec, turn[dist.rank :: dist.world_size]))
            for rank, (bits_of, steps_of) in enumerate(gathered):
                bits[turn[rank :: dist.world_size] - start] = bits_of
                steps += steps_of
            self.passes += len(turn)
            if self.progress is not None:
                self.progress.update(round(time.monotonic() - self.begun, 1) - self.progress.n)
        return bits, steps

    def _sums(self, spec: OrderSpec, samples: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if not len(samples):
            return np.empty(0), np.zeros(len(spec.group_sizes))
        decoding = Decoding(Orders(spec), spec.group_sizes)
        tokens, labels = self.meter.source.images.codes(self.images[samples % len(self.images)])
        sums = self.meter(decoding, tokens, labels, decoding.orders.of_images(samples)[None])
        return sums.images / tokens.shape[1], sums.steps[0]


def race(samples: Samples, best: OrderSpec, challengers: Sequence[OrderSpec]) -> OrderSpec:
    """The likeliest of the challengers, if it is likelier than ``best`` by more than a standard error; else ``best``.

    Successive halving: the half that looks worse leaves, the other half is shown twice as many samples.
    """
    left, count = [c for c in dict.fromkeys(challengers) if c != best], FIRST_RUNG

    def gain(challenger: OrderSpec) -> dict[str, float]:
        return mean(samples.bits(best, count) - samples.bits(challenger, count))

    while left:
        left.sort(key=lambda challenger: -gain(challenger)["mean"])
        left = left[: max(1, len(left) // 2)]
        found = gain(left[0])
        if found["mean"] <= -found["stderr"]:
            break  # the best of them is worse
        if count >= LAST_RUNG:
            return left[0] if found["mean"] > found["stderr"] else best
        count *= 2
    return best


class Search:
    """One search; :meth:`run` returns what it found when the budget is used up, or nothing is gained any more.

    Args:
        start: the schedule to start from. Thresholds are searched for kind "lpd", group sizes for all kinds.
        seed: of the random changes.
    """

    def __init__(self, samples: Samples, start: OrderSpec, seed: int) -> None:
        self.samples, self.best = samples, start
        self.rng = np.random.default_rng(seed)
        self.begun = time.monotonic()
        self.history: list[dict[str, object]] = []
        self.thresholds: list[tuple[float | None, int]] = []
        if start.kind == "lpd":
            largest = max(1, min(start.grid) // 2)
            repulsions = sorted({r for r in (0, 1, 2, 3, 4, 6, 8) if r <= largest} | {start.largest_repulsion})
            self.thresholds = list(itertools.product(PROXIMITIES, repulsions))

    def run(self) -> OrderSpec:
        try:
            self._round("thresholds", self._other_thresholds)
            self._round("shape of the group sizes", self._other_shapes)
            self._round("group sizes by dynamic programming", self._tabulated)
            idle = 0
            while idle < WITHOUT_GAIN:
                gained = self._round("thresholds along the steps, group sizes", self._changes)
                idle = 0 if gained else idle + 1
        except OutOfTime:
            pass
        return self.best

    def _round(self, what: str, challengers: Callable[[], Sequence[OrderSpec]]) -> bool:
        """Race these; whether one of them won."""
        before, found = self.best, race(self.samples, self.best, challengers())
        seconds = time.monotonic() - self.begun
        if found == before:
            return False
        gain = mean(self.samples.bits(before, LAST_RUNG) - self.samples.bits(found, LAST_RUNG))
        self.best = found
        self.history.append({"round": what, "seconds": round(seconds, 1), "gain": gain})
        logger.info("%s: %.4f ± %.4f bits per token likelier, on the images of the search", what, *gain.values())
        return True

    def _other_thresholds(self) -> list[OrderSpec]:
        return [replace(self.best, proximity_threshold=t, repulsion_threshold=r) for t, r in self.thresholds]

    def _with_sizes(self, sizes: Sequence[int]) -> OrderSpec:
        return replace(self.best, group_sizes=tuple(sizes))

    def _other_shapes(self) -> list[OrderSpec]:
        L, steps = sum(self.best.group_sizes), len(self.best.group_sizes)
        return [self._with_sizes(shaped_sizes(L, steps, shape)) for shape in SHAPES]

    def _tabulated(self) -> list[OrderSpec]:
        """Group sizes of least cost, if a group cost what one of its size does in a schedule of equal groups.

        The tables are made with the thresholds at hand, which are the same for all steps at this point.
        """
        L, curves = sum(self.best.group_sizes), {}
        for size in (size for size in LADDER if size < L):
            sizes = (1, *([size] * ((L - 1) // size)), *([(L - 1) % size] if (L - 1) % size else []))
            bits = self.samples.step_bits(self._with_sizes(sizes), 2 * FIRST_RUNG)
            full = np.array(sizes) == size
            curves[size] = (np.cumsum([0, *sizes[:-1]])[full], bits[full] / size)
        cost = cost_table(L, curves)
        steps = len(self.best.group_sizes)
        return [self._with_sizes(cheapest_sizes(cost, steps, self.best.kind in LPD_KINDS))]

    def _changes(self) -> list[OrderSpec]:
        """Random ones: thresholds of the steps before or after some step, tokens moved between steps, or both."""
        made = []
        for _ in range(MOVES):
            kind = self.rng.integers(3) if self.thresholds else 1
            spec = self.best
            if kind != 1:
                spec = self._change_thresholds(spec)
            if kind != 0:
                spec = self._move_tokens(spec)
            made.append(spec)
        return made

    def _change_thresholds(self, spec: OrderSpec) -> OrderSpec:
        """Another proximity or repulsion threshold, or both, at a step, from it on, or up to it."""
        steps = len(spec.group_sizes)
        if steps == 1:
            return spec
        values = self.thresholds[self.rng.integers(len(self.thresholds))]
        step = int(self.rng.integers(1, steps))
        start, stop = ((step, step + 1), (step, steps), (1, step + 1))[self.rng.integers(3)]
        which = self.rng.integers(3)
        changes: dict[str, Any] = {}
        for number, (name, value) in enumerate(zip(("proximity", "repulsion"), values, strict=True)):
            if which != number:
                before = spec.of_steps(getattr(spec, f"{name}_threshold"), name)
                after = (*before[:start], *[value] * (stop - start), *before[stop:])
                # The first step has no use for thresholds; where the others have the same, it is one for all.
                changes[f"{name}_threshold"] = after[1] if len(set(after[1:])) == 1 else after
        return replace(spec, **changes)

    def _move_tokens(self, spec: OrderSpec) -> OrderSpec:
        sizes = list(spec.group_sizes)
        first = 1 if spec.kind in LPD_KINDS else 0
        for _ in range(self.rng.integers(1, 4)):
            giving, taking = self.rng.integers(first, max(first + 1, len(sizes)), size=2)
            if first < len(sizes) and giving != taking and sizes[giving] > 1:
                moved = int(self.rng.integers(1, max(2, sizes[giving] // 3 + 1)))
                sizes[giving] -= moved
                sizes[taking] += moved
        return replace(spec, group_sizes=tuple(sizes))


def shaped_sizes(L: int, steps: int, shape: float) -> tuple[int, ...]:
    """First a group of 1, then groups so that after a share t of the steps about t^shape of the tokens are known."""
    if steps == 1:
        return (L,)
    ends = [1, *(round(L * (step / steps) ** shape) for step in range(2, steps)), L]
    for step in range(1, steps):  # every group has a token at least, and leaves one for each group after it
        ends[step] = min(max(ends[step], ends[step - 1] + 1), L - (steps - 1 - step))
    return tuple(b - a for a, b in itertools.pairwise((0, *ends)))


def cost_table(L: int, curves: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]]) -> NDArray[np.float64]:
    """Bits (L, L + 1) of a group of g tokens where a are known, in row a and column g; infinite where it has no room.

    Args:
        curves: by group size, (tokens known, bits per token). What lies between is interpolated.
    """
    known, sizes = np.arange(L), np.array(sorted(curves))
    per_token = np.stack([np.interp(known, *curves[size]) for size in sizes], axis=1)  # (L, sizes)
    cost = np.full((L, L + 1), np.inf)
    for a in known:
        g = np.arange(1, L - a + 1)
        cost[a, g] = g * np.interp(np.log(g), np.log(sizes), per_token[a])
    return cost


def cheapest_sizes(cost: NDArray[np.float64], steps: int, first_is_one: bool) -> tuple[int, ...]:
    """Group sizes of the least sum of costs, by dynamic programming: see :func:`cost_table`."""
    L = len(cost)
    least = np.full(L + 1, np.inf)  # of the steps so far, by the number of tokens known after them
    least[1 if first_is_one else slice(1, None)] = 0.0 if first_is_one else cost[0, 1:]
    chosen = []
    for _ in range(steps - 1):
        after, sizes = np.full(L + 1, np.inf), np.zeros(L + 1, np.int64)
        for end in range(2, L + 1):
            starts = np.arange(1, end)
            total = least[starts] + cost[starts, end - starts]
            start = int(total.argmin())
            after[end], sizes[end] = total[start], end - starts[start]
        least = after
        chosen.append(sizes)
    found, end = [], L
    for sizes in reversed(chosen):
        found.append(int(sizes[end]))
        end -= found[-1]
    return (end, *reversed(found))
