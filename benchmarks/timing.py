"""Interleaved timing: in every round each contender has its turn, in random order.

Medians and quartiles are over the rounds; a ratio is the median of the ratios of two times measured
in the same round, so that what slows a whole round cancels.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

CPU = torch.device("cpu")
Run = Callable[[], object]
Clock = Callable[[Run, Run, int, torch.device], float]

# A turn repeats a fast contender for this long: a single call of some microseconds is noise.
TURN_SECONDS, MAX_CALLS = 4e-3, 40
# Quartiles need this many rounds; the time limit is exceeded for them.
MIN_ROUNDS = 3
# torch.cuda._sleep counts cycles. At a lower clock it only sleeps for longer, which does no harm.
CYCLES_PER_SECOND, MAX_SLEEP_SECONDS = 2e9, 0.05


@dataclass(frozen=True)
class Plan:
    """How a table is timed.

    Args:
        rounds: how often each contender has its turn.
        device: where the contenders compute.
        seconds: no new round starts after this time, once there are three.
        whole: for calls of seconds: one call a turn, by the host's clock alone.
        now: that clock; on a machine with other work ``time.process_time``, the processor's time.
    """

    rounds: int
    device: torch.device = CPU
    seconds: float = float("inf")
    whole: bool = False
    now: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Args:
        name: its name in the table.
        run: one call.
        words: float32 words that a call reads and writes, counted by hand.
        samples: training samples that a call processes.
        is_limit: it moves memory and does nothing else.
        peak_bytes: the most memory that it allocates at once.
    """

    name: str
    run: Run
    words: int | None = None
    samples: int | None = None
    is_limit: bool = False
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Timing:
    """The seconds of a call in each round.

    On a GPU `seconds` are the device's own, between two events, and `wall` the host's.
    """

    contender: Contender
    seconds: list[float]
    wall: list[float] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def bandwidth(self) -> float | None:
        """GB/s at the median."""
        words = self.contender.words
        return None if words is None else 4e-9 * words / self.median

    def over(self, base: Timing, wall: bool = False) -> list[float]:
        """Time divided by another contender's, round by round."""
        pair = (self.wall, base.wall) if wall else (self.seconds, base.seconds)
        return [a / b for a, b in zip(*pair, strict=True)]


@dataclass(frozen=True)
class Table:
    """The timings of contenders that do the same work."""

    title: str
    rows: list[Timing]

    @property
    def limit(self) -> Timing | None:
        """The fastest row that only moves memory."""
        limits = [row for row in self.rows if row.contender.is_limit]
        return min(limits, key=lambda row: row.median, default=None)


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and the third quartile."""
    return np.quantile(values, (0.25, 0.75)).tolist()


def measure(
    title: str, contenders: Sequence[Contender], plan: Plan, prepare: Run = lambda: None
) -> Table:
    """Time all contenders, interleaved; `prepare` runs before every call and is not timed."""
    by_events = plan.device.type == "cuda" and not plan.whole
    clocks: list[Clock] = [device_time] if by_events else []
    clocks.append(partial(wall_time, now=plan.now))
    calls = [[_calls_per_turn(clock, c, plan, prepare) for clock in clocks] for c in contenders]
    turns: list[list[list[float]]] = [[[] for _ in clocks] for _ in contenders]
    gc.collect()
    gc.disable()
    try:
        for i in in_turn(len(contenders), plan):
            for clock, count, seconds in zip(clocks, calls[i], turns[i], strict=True):
                seconds.append(clock(contenders[i].run, prepare, count, plan.device))
    finally:
        gc.enable()
    rows = zip(contenders, turns, strict=True)
    return Table(title, [Timing(contender, *seconds) for contender, seconds in rows])


def in_turn(count: int, plan: Plan) -> Iterator[int]:
    """Yield whose turn it is: in every round each of `count` contenders, in random order."""
    deadline = time.monotonic() + plan.seconds
    order, rng = list(range(count)), random.Random(0)
    for done in range(plan.rounds):
        if done >= MIN_ROUNDS and time.monotonic() > deadline:
            return
        rng.shuffle(order)
        yield from order


def wall_time(
    run: Run,
    prepare: Run,
    calls: int,
    device: torch.device,
    wait: bool = True,
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the host's median seconds of a call, from an idle device to an idle device.

    Without `wait` until the call returns.
    """

    def once() -> float:
        prepare()
        synchronize(device)
        start = now()
        run()
        if wait:
            synchronize(device)
        return now() - start

    if calls > 1:  # the first of several finds the previous contender's data in the caches
        once()
    return statistics.median(once() for _ in range(calls))


def device_time(run: Run, prepare: Run, calls: int, device: torch.device) -> float:
    """Return the median seconds of a call between two CUDA events.

    The device sleeps until the host has queued the call, so that it never waits for the host (a
    call that itself waits for the device still shows that).
    """
    launch = wall_time(run, prepare, 1, device, wait=False)
    cycles = int(min(2 * launch, MAX_SLEEP_SECONDS) * CYCLES_PER_SECOND)

    def once() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare()
        torch.cuda._sleep(cycles)
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return statistics.median(once() for _ in range(calls))


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _calls_per_turn(clock: Clock, contender: Contender, plan: Plan, prepare: Run) -> int:
    if plan.whole:
        return 1
    return calls_for(min(clock(contender.run, prepare, 1, plan.device) for _ in range(3)))


def calls_for(once: float) -> int:
    """How often a turn repeats a call of `once` seconds."""
    return max(1, min(MAX_CALLS, int(TURN_SECONDS / max(once, 1e-9))))
