"""Stage `tests`: the whole suite's tests marked `cuda`. None collected, or all skipped, is a
failure: it would look like success.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu import Settings, StageFailed
from benchmarks.report import Report

ROOT = Path(__file__).parents[2]
# pyproject's own options are strict about plugins that a machine may lack. A file that needs such a
# one does not keep the others from running, and counts as an error.
PYTEST = (
    "-o",
    "addopts=",
    "-p",
    "no:cacheprovider",
    "-q",
    "-rfE",
    "--continue-on-collection-errors",
)
REHEARSED = ("-m", "not cuda and not slow", "tests/test_groups.py")
SHOWN = 20


@dataclass(frozen=True)
class Outcome:
    """What pytest counted, and the names of what failed."""

    tests: int
    failures: int
    errors: int
    skipped: int
    bad: tuple[str, ...] = ()

    @property
    def ran(self) -> int:
        return self.tests - self.skipped

    @property
    def passed(self) -> int:
        return self.ran - self.failures - self.errors


def run(report: Report, settings: Settings, select: Sequence[str] | None = None) -> None:
    """Run pytest and judge what it counted; `select` are its arguments, by default the marker."""
    if select is None:
        select = REHEARSED if settings.rehearsal else ("-m", "cuda")
    outcome = pytest(select)
    report.fact("pytest", " ".join(select))
    counts = ("passed", "failures", "errors", "skipped")
    report.fact("tests", ", ".join(f"{getattr(outcome, name)} {name}" for name in counts))
    for name in outcome.bad[:SHOWN]:
        report.fact(f"failed: {name}", "see the output")
    judge(outcome)


def pytest(select: Sequence[str]) -> Outcome:
    """Run pytest from the root of the repository, its output passing through."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", *PYTEST, f"--junitxml={results}", *select]
        # Kernels that do not compile are to fail here, not to be passed by plain torch.
        environment = {**os.environ, "FBOPT_BACKEND": "kernels"}
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not results.exists():
            raise StageFailed(f"pytest ended with status {status} and no results")
        return read(results)


def read(results: Path) -> Outcome:
    """Read the counts of a JUnit file."""
    suites = list(ElementTree.parse(results).getroot().iter("testsuite"))
    counts = [
        sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    ]
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return Outcome(*counts, tuple(bad))


def judge(outcome: Outcome) -> None:
    """Raise StageFailed unless some tests ran and none failed."""
    if outcome.failures or outcome.errors:
        raise StageFailed(f"{outcome.failures} tests failed, {outcome.errors} errors")
    if outcome.tests == 0:
        raise StageFailed("no test was collected: nothing is shown")
    if outcome.ran == 0:
        raise StageFailed(f"all {outcome.skipped} tests were skipped: nothing is shown")
