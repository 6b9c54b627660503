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

import torch

from benchmarks.clocks import Events, Wall
from benchmarks.devices import CPU

# A turn repeats a fast contender until it has lasted so long: one call of microseconds is noise.
TURN_SECONDS = 4e-3
MAX_CALLS = 40
# With fewer rounds there are no quartiles; a plan's time is exceeded for them.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """How a table is timed: where, how many rounds, and after how many seconds at the latest.

    Calls on a GPU are timed by its events, and by the wall besides; a `whole` step, which takes
    seconds, by the wall alone and once a round.
    """

    rounds: int
    device: torch.device = CPU
    seconds: float = float("inf")
    compiled: bool = False
    whole: bool = False

    @property
    def clocks(self) -> list[Wall | Events]:
        """The clock that counts, and on a GPU the wall's beside it."""
        by_events = self.device.type == "cuda" and not self.whole
        return [Events(self.device)] * by_events + [Wall(self.device)]


@dataclass(frozen=True)
class Contender:
    """Something to time.

    `words` are the float32 words that it moves in all, counted by hand; `limit` names the contender
    that moves as many and nothing else; `items` are the samples that a call works through; with
    `per`, times are told for that part of a call.
    """

    name: str
    run: Callable[[], object]
    words: int | None = None
    limit: str | None = None
    items: int | None = None
    per: int = 1


@dataclass(frozen=True)
class Timing:
    """The seconds a call took in each round; `wall` where `seconds` are the device's."""

    name: str
    seconds: list[float]
    words: int | None = None
    limit: str | None = None
    items: int | None = None
    wall: list[float] | None = None

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

    def over(self, base: Timing, wall: bool = False) -> list[float]:
        """The ratio to another contender, round by round: what slows a whole round cancels."""
        pair = (self.wall, base.wall) if wall else (self.seconds, base.seconds)
        return [a / b for a, b in zip(*pair, strict=True)]


@dataclass(frozen=True)
class Timings:
    """All contenders of one table; the first is ours."""

    title: str
    rows: list[Timing] = field(default_factory=list)

    def __getitem__(self, name: str) -> Timing:
        return next(row for row in self.rows if row.name == name)

    def ratio(self, name: str, base: str, wall: bool = False) -> float:
        """The median over the rounds of one contender's time divided by another's."""
        return statistics.median(self[name].over(self[base], wall))

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
    plan: Plan,
    prepare: Callable[[], object] | None = None,
    seed: int = 0,
) -> Timings:
    """Time all contenders, interleaved; `prepare` runs before every call and is not timed."""
    deadline, clocks = time.monotonic() + plan.seconds, plan.clocks
    calls = [
        [1 if plan.whole else _calls(clock, c, prepare) for c in contenders] for clock in clocks
    ]
    seconds: list[list[list[float]]] = [[[] for _ in contenders] for _ in clocks]
    order, rng = list(range(len(contenders))), random.Random(seed)
    with _no_garbage_collection():
        for done in range(plan.rounds):
            if done >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            rng.shuffle(order)
            for i in order:
                for k, clock in enumerate(clocks):
                    turn = clock.turn(contenders[i].run, prepare, calls[k][i])
                    seconds[k][i].append(turn / contenders[i].per)
    first, *rest = seconds
    rows = [
        Timing(c.name, first[i], c.words, c.limit, c.items, rest[0][i] if rest else None)
        for i, c in enumerate(contenders)
    ]
    return Timings(title, rows)


def in_turn(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that runs the next one of these each time."""
    if len(runs) == 1:
        return runs[0]
    position = 0

    def run() -> object:
        nonlocal position
        position = (position + 1) % len(runs)
        return runs[position]()

    return run


def _calls(clock: Wall | Events, contender: Contender, prepare: Callable[[], object] | None) -> int:
    once = clock.turn(contender.run, prepare, 1)
    if once < TURN_SECONDS:  # the first call pays for what later ones find ready
        once = min(once, *(clock.turn(contender.run, prepare, 1) for _ in range(2)))
    return max(1, min(MAX_CALLS, int(TURN_SECONDS / max(once, 1e-9))))


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
