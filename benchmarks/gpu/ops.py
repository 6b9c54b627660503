"""Stage `ops`: every kernel against a copy of as many bytes, and the penalised chunk update against
foreach and the published sequence: device time, wall time, launches, waits.

Caches: the chunk updates are timed after gradients were renewed and the cache was emptied by
reading other data, and once more without that. Single kernels take sets of operands in turn, so
many that four times the cache passes between two uses of one; 1,000 small tensors never leave it.
"""

from __future__ import annotations

import functools
import statistics

import torch

from benchmarks import devices, rivals
from benchmarks.cases import Chunk, shapes
from benchmarks.gpu import Settings
from benchmarks.harness import Plan, Timings
from benchmarks.ops import chunk_table, chunk_updates, limit_of, nothing, prepare, single_table
from benchmarks.report import Report
from benchmarks.single import WORDS
from benchmarks.traces import refused_sync, trace

SIZES = ("resnet18", "tiny", "large")
ROUNDS, QUICK_ROUNDS = 60, 3
TRACES = 3
COPY_GOAL, LAUNCH_GOAL = 0.85, 4
SYNCED_GOAL, UNSYNCED_GOAL = 1.5, 2.2
EXACT_GOAL = 1.3
PUBLISHED_DEVICE_GOAL, PUBLISHED_WALL_GOAL = 3.5, 8
OURS, PUBLISHED, EXACT = rivals.Ours.name, rivals.Published.name, rivals.OursExact.name
# Seconds for a table at most; without a GPU only small sizes are rehearsed.
TABLE_SHARE = 0.1
REHEARSED = ("small-cnn", "tiny")


def plan(settings: Settings, compiled: bool = False) -> Plan:
    """How a table of this stage is timed."""
    rounds = settings.rounds or (QUICK_ROUNDS if settings.quick else ROUNDS)
    compiled = compiled and not settings.quick and devices.compiles(settings.where)
    return Plan(rounds, settings.where, TABLE_SHARE * settings.left(), compiled)


def run(report: Report, settings: Settings) -> None:
    """All tables, and the goals of ResNet-18's tensors."""
    sizes = REHEARSED if settings.rehearsal else SIZES
    cold: dict[str, Timings] = {}
    for size in sizes:
        if size != "large":
            cold[size] = chunk_tables(report, settings, size)
        single = single_table(size, plan(settings))
        limit = limit_of(single)
        report.table(single, limit, base=limit and limit.name)
        if size != "tiny" and not settings.rehearsal:
            single_goals(report, single)
    for size, timings in cold.items():  # in the end: launches are slower once a profiler has run
        busy = traces(report, size, settings.where)
        chunk_goals(report, timings, busy, goals=size != "tiny" and not settings.rehearsal)


def chunk_tables(report: Report, settings: Settings, size: str) -> Timings:
    """The penalised chunk update on one size, with empty caches and, on a GPU, as they are."""
    cold = chunk_table(size, plan(settings, compiled=size == "resnet18"))
    report.table(cold, limit_of(cold))
    if not settings.rehearsal:
        hot = chunk_table(size, plan(settings), hot=True)
        report.table(hot, limit_of(hot))
    return cold


def chunk_goals(report: Report, timings: Timings, busy: dict[str, float], goals: bool) -> None:
    """The ratios that count, beside what they should be."""

    def bound(value: float) -> float | None:
        return value if goals else None

    report.heading(f"{timings.title}, time over fbopt's:")
    for group, goal in ((rivals.FOREACH, SYNCED_GOAL), (rivals.UNSYNCED, UNSYNCED_GOAL)):
        best = timings.fastest([kind.name for kind in group])
        report.goal(timings.title, best, timings.ratio(best, OURS), at_least=bound(goal))
    if busy:
        ratio, how = busy[PUBLISHED] / busy[OURS], "time of its kernels"
    else:
        ratio, how = timings.ratio(PUBLISHED, OURS), "device time, gaps counted in"
    report.goal(timings.title, f"{PUBLISHED}, {how}", ratio, at_least=bound(PUBLISHED_DEVICE_GOAL))
    if EXACT in [row.name for row in timings.rows]:
        report.goal(timings.title, EXACT, timings.ratio(EXACT, OURS), at_most=bound(EXACT_GOAL))
    if timings[OURS].wall is not None:
        wall = timings.ratio(PUBLISHED, OURS, wall=True)
        claim = f"{PUBLISHED}, wall"
        report.goal(timings.title, claim, wall, at_least=bound(PUBLISHED_WALL_GOAL))


def traces(report: Report, size: str, device: torch.device) -> dict[str, float]:
    """Launches, waits and the kernels' seconds of every contender; empty without a profiler."""
    chunk, busy = Chunk.of(shapes(size), device=device), {}
    prepared = prepare(chunk, hot=False)
    for update in chunk_updates(chunk, compiled=False):
        run = functools.partial(update.update, nothing)
        seen = [trace(run, prepared, device) for _ in range(TRACES)]
        found = seen[-1]
        if found is None:
            report.fact(f"{size}: launches", "not counted: the profiler sees no device")
            return {}
        busy[update.name] = statistics.median(one.busy_seconds for one in seen)
        text = f"{len(found.launches)} launches, {1e6 * busy[update.name]:.1f} µs in kernels"
        report.fact(f"{size}: {update.name}", f"{text}, {len(found.waits)} waits of the host")
        if isinstance(update, rivals.Ours):
            report.fact(
                f"{size}: what {update.name} launches", "; ".join(map(brief, found.launches))
            )
            refusal = refused_sync(run, device)
            waits = len(found.waits) + (refusal is not None)
            about = f"penalised chunk update of {update.name}, {size}"
            few = LAUNCH_GOAL if size != "tiny" else None
            report.goal(about, "launches", len(found.launches), at_most=few)
            report.goal(about, f"waits of the host ({refusal or 'none'})", waits, at_most=0)
    return busy


def brief(kernel: str) -> str:
    """A kernel's name without its arguments."""
    return kernel.replace("(anonymous namespace)::", "").split("(")[0][:80]


def single_goals(report: Report, timings: Timings) -> None:
    """Every kernel's bytes/s as a part of those of a copy of as many bytes."""
    report.heading(f"{timings.title}, bytes/s over those of a copy of as many:")
    for op in WORDS:
        row = timings[op]
        value = row.rate / timings[row.limit].rate
        report.goal(timings.title, op, value, at_least=COPY_GOAL)
