"""Timing for all benchmarks: every contender in every round, in random order; medians and quartiles
over the rounds; ratios of times measured in the same round.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

# A turn repeats a fast contender until it has lasted so long: one call of microseconds is noise.
TURN_SECONDS = 4e-3
MAX_CALLS = 40


@dataclass(frozen=True)
class Contender:
    """Something to time. `words` are the float32 words that it moves in all, counted by hand."""

    name: str
    run: Callable[[], object]
    words: int | None = None


@dataclass(frozen=True)
class Timing:
    """The seconds a call took in each round."""

    name: str
    seconds: list[float]
    words: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)

    @property
    def rate(self) -> float | None:
        """GB/s at the median."""
        return None if self.words is None else 4e-9 * self.words / self.median

    def over(self, base: Timing) -> list[float]:
        """The ratio to another contender, round by round: what slows a whole round cancels."""
        return [a / b for a, b in zip(self.seconds, base.seconds, strict=True)]


@dataclass(frozen=True)
class Timings:
    """All contenders of one table; the first is ours."""

    title: str
    rows: list[Timing] = field(default_factory=list)

    def __getitem__(self, name: str) -> Timing:
        return next(row for row in self.rows if row.name == name)

    def ratio(self, name: str, base: str) -> float:
        """The median over the rounds of one contender's time divided by another's."""
        return statistics.median(self[name].over(self[base]))

    def fastest(self, names: Sequence[str]) -> str | None:
        """The one of these with the least median time; None where none was timed."""
        timed = [row for row in self.rows if row.name in names]
        return min(timed, key=lambda row: row.median).name if timed else None


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def measure(
    title: str,
    contenders: Sequence[Contender],
    rounds: int,
    prepare: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> Timings:
    """Time all contenders, interleaved; `prepare` runs before every call and is not timed."""
    calls = [_calls(contender, prepare) for contender in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    order, rng = list(range(len(contenders))), random.Random(seed)
    with _no_garbage_collection():
        for _ in range(rounds):
            rng.shuffle(order)
            for i in order:
                seconds[i].append(_turn(contenders[i], prepare, calls[i]))
    rows = [Timing(c.name, s, c.words) for c, s in zip(contenders, seconds, strict=True)]
    return Timings(title, rows)


def _calls(contender: Contender, prepare: Callable[[], object]) -> int:
    once = _timed(contender, prepare)
    if once < TURN_SECONDS:  # the first call pays for what later ones find ready
        once = min(once, _timed(contender, prepare), _timed(contender, prepare))
    return max(1, min(MAX_CALLS, int(TURN_SECONDS / once)))


def _turn(contender: Contender, prepare: Callable[[], object], calls: int) -> float:
    """The median of a turn's calls; the first of several finds the caches full of others' data."""
    if calls > 1:
        _timed(contender, prepare)
    return statistics.median(_timed(contender, prepare) for _ in range(calls))


def _timed(contender: Contender, prepare: Callable[[], object]) -> float:
    prepare()
    start = time.perf_counter()
    contender.run()
    return time.perf_counter() - start


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
