"""The tables of `benchmarks.step --peers`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import CORES
from benchmarks.peers.compare import compare, table
from benchmarks.peers.pool import pool
from benchmarks.peers.workloads import CHUNKS, SAMPLES, workload
from benchmarks.report import QUICK_ROUNDS, Report
from benchmarks.timing import Plan

ROUNDS = 15
QUICK_SAMPLES, QUICK_CHUNK = 16, 8


def kinds() -> list[str]:
    """The kinds of workers: JAX only where it is installed."""
    if find_spec("jax") is None:
        print("JAX is left out, it is not installed: pip install jax, or fbopt[bench]")
        return ["torch"]
    return ["torch", "jax"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--peers`."""
    found = parser.add_argument_group("beside torch and JAX, on the CPU")
    found.add_argument("--peers", action="store_true", help="compare the penalised step")
    found.add_argument("--workloads", nargs="+", choices=tuple(CHUNKS), default=list(CHUNKS))


def main(choice: argparse.Namespace, argv: Sequence[str] | None = None) -> Path:
    """Run all workloads and return the path of the JSON."""
    if not CORES or choice.device.type != "cpu":
        raise SystemExit("--peers: runs on the CPU, under Linux, which gives workers their cores")
    report = Report("step", choice, argv, variant="peers")
    plan = Plan(choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS), seconds=choice.seconds)
    with pool(CORES[: choice.threads], kinds()) as workers:
        for network in choice.workloads:
            for chunk in CHUNKS[network]:
                size = (QUICK_SAMPLES, QUICK_CHUNK) if choice.quick else (SAMPLES, chunk)
                work = workload(network, *size)
                found = table(work.title, compare(workers, work, plan))
                jax = [row for row in found.rows if row.contender.name.startswith("JAX")]
                report.table(found, min(jax, key=lambda row: row.median, default=None))
                if choice.quick:
                    break
    return report.write(choice.out)
