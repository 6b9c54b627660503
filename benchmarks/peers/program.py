"""The tables of `benchmarks.step --peers`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import CORES
from benchmarks.peers.compare import compare
from benchmarks.peers.pool import pool
from benchmarks.peers.workload import Workload
from benchmarks.peers.workloads import SETTINGS, chosen
from benchmarks.report import QUICK_ROUNDS, Report, compiles
from benchmarks.timing import CPU, Plan, Table

ROUNDS = 15


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--peers`."""
    found = parser.add_argument_group("beside torch and JAX, on the CPU")
    found.add_argument("--peers", action="store_true", help="compare the penalised step")
    found.add_argument("--workloads", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
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


def title(workload: Workload, folder: Path | None) -> str:
    """A workload in words."""
    what = {"resnet18": "random images" if folder is None else "images of CIFAR-10"}
    size = f"{workload.samples:,} {what.get(workload.network, 'samples')} in {workload.count}"
    layout = "" if workload.precision == "fp32" else f", {workload.precision}, channels_last"
    return f"Penalised gradient, {workload.title}, {size} chunks of {workload.chunk}{layout}"


def main(choice: argparse.Namespace, argv: Sequence[str] | None = None) -> Path:
    """Run all workloads and return the path of the JSON."""
    if not CORES or choice.device.type != "cpu":
        raise SystemExit("--peers: runs on the CPU, under Linux, which gives workers their cores")
    report = Report("step", choice, argv, variant="peers")
    plan = Plan(choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS), seconds=choice.seconds)
    cores, takes_part = CORES[: choice.threads], wanted(choice.quick)
    ranks = [len(cores)] if len(cores) > 1 else []
    with pool(cores, kinds(), ranks) as workers:
        for workload in chosen(choice):
            rows = compare(workers, workload, plan, takes_part)
            jax = [row for row in rows if row.contender.name.startswith("JAX")]
            base = min(jax, key=lambda row: row.median, default=rows[0])
            report.table(Table(title(workload, choice.data_dir), rows), base)
    return report.write(choice.out)
