"""How the benchmarks measure: a gate of correctness, then interleaved samples.

pytest-benchmark measures one test after the other, minutes apart, and a machine changes its speed
within minutes. Ratios are only honest between samples taken side by side, so the sampling is ours:
:func:`interleave` runs every variant once per round. The samples are then played to
pytest-benchmark, one test per variant, by a clock that shows recorded time (:class:`Replay`):
selection, statistics, storage and comparison of runs stay pytest-benchmark's.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

#: Each weight is a few rounded operations away from the exact one (two normalizations, a dot
#: product, a division), each within about one unit in the last place when its sums are blocked.
ROUNDING = 8


def nothing() -> None:
    """Leave things as they are."""


@dataclass(frozen=True)
class Work:
    """``run`` is timed; ``reset`` comes after it, off the clock, and undoes what has to be."""

    run: Callable[[], object]
    reset: Callable[[], object] = nothing


@dataclass(frozen=True)
class Plan:
    """How much to sample.

    Attributes:
        seconds: about how long, within ``least`` and ``most`` rounds.
        warmup: rounds before, whose samples are dropped.
        settle: runs of a work before each of its samples, off the clock. They bring back to the
            caches what the other works drove out of them, which says nothing about this one.
    """

    seconds: float = 5.0
    least: int = 10
    most: int = 200
    warmup: int = 2
    settle: int = 0

    def rounds(self, seconds_per_round: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / seconds_per_round)))


class Result(NamedTuple):
    """Seconds per run, and the largest relative error that the gate found."""

    samples: list[float]
    error: float


#: Proves that a benchmark runs; measures nothing.
QUICK_PLAN = Plan(least=3, most=3, warmup=1)


def interleave(
    works: Mapping[str, Work],
    rounds: int,
    settle: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per run of each work, sampled side by side: one sample of every work in every round.

    The order is shuffled anew for each round (always the same shuffles), so that none of the works
    always follows the same other one. What a run returns is released off the clock. The garbage
    collector waits until the end. ``settle``: see :class:`Plan`.
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                for _ in range(settle):
                    works[name].run()
                    works[name].reset()
                start = clock()
                result = works[name].run()
                samples[name].append(clock() - start)
                del result
                works[name].reset()
    finally:
        gc.enable()
    return samples


def measure(works: Mapping[str, Work], plan: Plan) -> dict[str, list[float]]:
    """Warm every work up, then sample as many interleaved rounds as ``plan`` allows."""
    warmup = interleave(works, plan.warmup)
    last_round = sum(samples[-1] for samples in warmup.values())
    return interleave(works, plan.rounds(last_round), plan.settle)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(
    actual: Sequence[Tensor],
    rounded: Sequence[Tensor],
    exact: Sequence[Tensor],
    rounding: int = ROUNDING,
) -> float:
    """The gate: raise AssertionError unless ``actual`` is as right as its dtype lets it be.

    Args:
        actual: what is about to be timed.
        rounded: the same by the reference in the dtype of ``actual``.
        exact: the same by the reference in fp64, from the same state.
        rounding: the rounding band, in units of the last place of the largest entry.

    Returns:
        The largest error, relative to the largest entry of its tensor. It may be twice the error of
        ``rounded`` plus a rounding band.
    """
    worst = 0.0
    for i, (a, r, e) in enumerate(zip(actual, rounded, exact, strict=True)):
        assert a.shape == e.shape, f"tensor {i}: expected shape {e.shape}, got {a.shape}"
        magnitude = e.abs().max().item()
        error = (a - e).abs().max().item()
        band = rounding * torch.finfo(a.dtype).eps * magnitude
        allowed = 2 * (r - e).abs().max().item() + band
        assert error <= allowed, f"tensor {i}: expected an error <= {allowed:.3g}, got {error:.3g}"
        worst = max(worst, error / magnitude) if magnitude else worst
    return worst


def gradient_of(parameter: Tensor) -> Tensor:
    """What the last backward left in ``parameter.grad``."""
    assert parameter.grad is not None, "expected a gradient after the backward, got None"
    return parameter.grad


class Replay:
    """A clock that shows recorded time: ``read`` is the timer of the tests."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def record(
        self, benchmark: BenchmarkFixture, samples: Sequence[float], **extra_info: object
    ) -> None:
        """Give ``benchmark`` the ``samples`` (seconds) as its rounds, and ``extra_info``."""
        remaining = iter(samples)

        def next_sample() -> None:
            self.now += next(remaining)

        self.now = 0.0
        benchmark.extra_info.update(extra_info)
        benchmark.pedantic(next_sample, rounds=len(samples))


REPLAY = Replay()
