"""Stage `finishing`: norm, clip, weight decay, momentum and update, against torch's own."""

from __future__ import annotations

from benchmarks.finishing import Compiled, Ours, TorchForeach, TorchFused
from benchmarks.gpu import Settings
from benchmarks.gpu.ops import plan
from benchmarks.harness import Timings
from benchmarks.ops import finish_table, limit_of
from benchmarks.report import Report

SIZES, REHEARSED = ("resnet18", "tiny"), ("small-cnn",)


def run(report: Report, settings: Settings) -> None:
    """A table for each size, with empty caches and, on a GPU, as they are."""
    for size in REHEARSED if settings.rehearsal else SIZES:
        cold = finish_table(size, plan(settings, compiled=size == "resnet18"))
        report.table(cold, limit_of(cold))
        ratios(report, cold)
        if not settings.rehearsal:
            hot = finish_table(size, plan(settings), hot=True)
            report.table(hot, limit_of(hot))


def ratios(report: Report, timings: Timings) -> None:
    """Torch's time over ours: no goals were set."""
    report.heading(f"{timings.title}, time over fbopt's:")
    timed = [row.name for row in timings.rows]
    for kind in (TorchForeach, TorchFused, Compiled):
        if kind.name in timed:
            report.goal(timings.title, kind.name, timings.ratio(kind.name, Ours.name))
            if timings[kind.name].wall is not None:
                wall = timings.ratio(kind.name, Ours.name, wall=True)
                report.goal(timings.title, f"{kind.name}, wall", wall)
