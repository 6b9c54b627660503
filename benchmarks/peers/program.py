"""The tables of `benchmarks.step --peers`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import CORES
from benchmarks.peers import growth_figure
from benchmarks.peers.compare import compare
from benchmarks.peers.growth import Axis, points
from benchmarks.peers.others import Others
from benchmarks.peers.pool import Pool, pool
from benchmarks.peers.workload import Workload
from benchmarks.peers.workloads import SETTINGS, chosen
from benchmarks.report import QUICK_ROUNDS, Report, compiles
from benchmarks.timing import CPU, Plan, Table, Timing

ROUNDS = 15


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--peers`."""
    found = parser.add_argument_group("beside torch and JAX, on the CPU")
    found.add_argument("--peers", action="store_true", help="compare the penalised step")
    found.add_argument("--workloads", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    found.add_argument("--growth", action="store_true", help="how the time grows, as a figure")
    found.add_argument("--data-dir", type=Path, help="CIFAR-10 as DIR/train/CLASS/IMAGE")


def kinds() -> list[str]:
    """The kinds of workers: JAX where it is installed."""
    if find_spec("jax") is not None:
        return ["torch", "jax"]
    print("JAX is left out, it is not installed: pip install jax, or fbopt[bench]")
    return ["torch"]


def wanted(quick: bool) -> Callable[[str], bool]:
    """Whether a contender takes part: compiled ones not where that takes too long or fails."""
    if quick or not compiles(CPU):
        return lambda name: "compile" not in name
    return lambda name: True


def title(workload: Workload, folder: Path | None = None) -> str:
    """A workload in words."""
    what = {"resnet18": "random images" if folder is None else "images of CIFAR-10"}
    size = f"{workload.samples:,} {what.get(workload.network, 'samples')} in {workload.count}"
    how = "" if workload.precision == "fp32" else f", {workload.precision}"
    return f"Penalised gradient, {workload.title}, {size} chunks of {workload.chunk}{how}"


@dataclass(frozen=True)
class Run:
    """What all tables share."""

    workers: Pool
    plan: Plan
    report: Report
    takes_part: Callable[[str], bool]

    def table(
        self, heading: str, workload: Workload, is_shown: Callable[[str], bool] = bool
    ) -> list[Timing]:
        """Measure, print and keep a table; its ratios are to JAX's faster contender, if any."""
        rows = compare(
            self.workers, workload, self.plan, lambda n: self.takes_part(n) and is_shown(n)
        )
        jax = [row for row in rows if row.contender.name.startswith("JAX")]
        base = min(jax, key=lambda row: row.median, default=rows[0])
        self.report.table(Table(heading, rows), base)
        return rows

    def growth(self, quick: bool) -> list[Axis]:
        """Measure all sizes."""
        axes: dict[str, Axis] = {}
        for point in points(quick):
            axis = axes.setdefault(point.axis.label, point.axis)
            axis.add(self.table(title(point.workload), point.workload, axis.draws), point.value)
        self.report.facts["growth"] = {label: axis.curves for label, axis in axes.items()}
        return list(axes.values())


def main(choice: argparse.Namespace, argv: Sequence[str] | None = None) -> Path:
    """Run all workloads, or all sizes, and return the path of the JSON."""
    if not CORES or choice.device.type != "cpu":
        raise SystemExit("--peers: runs on the CPU, under Linux, which gives workers their cores")
    report = Report("step", choice, argv, variant="growth" if choice.growth else "peers")
    plan = Plan(choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS), seconds=choice.seconds)
    cores, takes_part, axes = CORES[: choice.threads], wanted(choice.quick), []
    ranks = range(1, len(cores) + 1) if choice.growth else [len(cores)] * (len(cores) > 1)
    with pool(cores, kinds(), ranks) as workers:
        others, run = Others(workers.cpu_seconds), Run(workers, plan, report, takes_part)
        if choice.growth:
            axes = run.growth(choice.quick)
        else:
            for workload in chosen(choice):
                shows = SETTINGS[workload.network].shows
                run.table(title(workload, choice.data_dir), workload, shows)
        report.facts["others"] = others.share()
    print(f"\nother programs used {report.facts['others']:.1%} of the processor meanwhile")
    path = report.write(choice.out)
    if axes:
        heading = f"{report.machine['cpu']}, {len(cores)} cores, torch {report.machine['torch']}"
        growth_figure.draw(axes, heading, path.with_suffix(".png"))
    return path
