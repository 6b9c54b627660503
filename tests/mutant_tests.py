"""The tests that concern a mutant: which of them reach its lines, and how they end.

One run under coverage finds the lines and seconds of every test. A mutant is tested in a fork of a
process that has imported torch and pytest, but nothing of fbopt.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import pytest
import torch
from mutant_source import MODULES, ROOT, Mutant

COPY = ROOT / "mutants"
PARTS = ("fbopt", "csrc", "tests", "pyproject.toml")
TESTS = (
    *("test_optim", "test_clip", "test_penalty", "test_accumulate", "test_closure"),
    *("test_chunk_clip", "test_bad_input", "test_pickle", "test_exact_sums", "test_drop_in"),
    *("test_parameter_sets", "test_penalised_objective", "test_perturbations"),
    *("test_adaptive_sharpness", "test_searched_step", "test_line_searches", "test_lbfgs"),
    *("test_diagnosis", "engine/test_backward", "engine/test_flat_parameters"),
    *("engine/test_vectorized", "engine/test_vectorized_state", "engine/test_weights"),
    *("engine/test_history", "ops/test_fixed_point"),
)
# What tests import besides fbopt: once, rather than once per mutant.
PRELOAD = (
    *("torch._dynamo", "torch.func", "torch.distributed.fsdp", "torch.distributed.optim"),
    *("torch.distributed.tensor", "xdist", "xdist.plugin", "pytest_timeout"),
)
LONGEST = 2.0  # seconds of a test; longer ones are left out
BUDGET = 20.0  # seconds of the tests for one mutant, as they take without a fault


def prepare() -> None:
    """Copy what is tested, and import what tests import besides."""
    COPY.mkdir(exist_ok=True)
    for part in PARTS:
        shutil.rmtree(COPY / part, ignore_errors=True)
        if (ROOT / part).is_dir():
            pattern = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, COPY / part, ignore=pattern)
        else:
            shutil.copy(ROOT / part, COPY / part)
    os.chdir(COPY)
    sys.path[:0] = [str(COPY), str(COPY / "tests")]
    os.environ |= {"PYTHONPATH": str(COPY), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    for name in PRELOAD:
        importlib.import_module(name)


class Recorder:
    """A plugin of pytest that finds the time of every test and the lines that it reaches."""

    def __init__(self, cover: coverage.Coverage) -> None:
        self.cover, self.seconds = cover, defaultdict[str, float](float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.cover.switch_context(item.nodeid)
        result = yield
        self.cover.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.seconds[report.nodeid] = float("inf")


class Selection:
    """A plugin of pytest that runs these tests alone, in this order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.places = {name: place for place, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.places]
        items.sort(key=lambda item: self.places[item.nodeid])


class Reached:
    """Which tests reach which lines, and how long they take."""

    def __init__(self) -> None:
        found = COPY / "measured.json"
        files = [file for part in ("fbopt", "tests") for file in (ROOT / part).rglob("*.py")]
        if not found.exists() or found.stat().st_mtime < max(f.stat().st_mtime for f in files):
            print("measuring which tests reach which lines", flush=True)
            _forked(lambda: _measure(found), 3600)
        reached, self.seconds = json.loads(found.read_text())
        self.by_line = {m: {int(k): v for k, v in lines.items()} for m, lines in reached.items()}
        failed = [name for name, seconds in self.seconds.items() if seconds == float("inf")]
        print(f"{len(self.seconds)} tests, of which are left out as failed: {failed}", flush=True)

    def choose(self, mutant: Mutant, budget: float) -> list[str]:
        """The tests that reach a statement: first the shortest case of each function."""
        reached = self.by_line[mutant.module]
        first, last = mutant.lines
        lines = range(first, last + 1) if last else reached
        names = {name for line in lines for name in reached.get(line, ())}
        if names == {""}:  # it runs when the module is imported
            names = {name for found in reached.values() for name in found}
        short = [name for name in names if name and self.seconds[name] <= LONGEST]
        by_time = sorted(short, key=lambda name: (self.seconds[name], name))
        firsts = {name.split("[")[0]: name for name in reversed(by_time)}
        chosen: dict[str, None] = {}
        spent = 0.0
        for order, limit in (([*firsts.values()][::-1], budget / 2), (by_time, budget)):
            for name in order:
                if name not in chosen and spent + self.seconds[name] <= limit:
                    chosen[name] = None
                    spent += self.seconds[name]
        return list(chosen)


def _measure(found: Path) -> int:
    files = [str(COPY / "fbopt" / f"{name}.py") for name in MODULES]
    cover = coverage.Coverage(data_file=None, include=files, config_file=False)
    recorder = Recorder(cover)
    cover.start()
    code = pytest.main(_arguments(TESTS), plugins=[recorder])
    cover.stop()
    data = cover.get_data()
    reached = {f"fbopt/{Path(f).name}": data.contexts_by_lineno(f) for f in data.measured_files()}
    found.write_text(json.dumps([reached, recorder.seconds]))
    return int(code)


def _arguments(files: Sequence[str], *more: str) -> list[str]:
    paths = [f"tests/{file.removeprefix('tests/').removesuffix('.py')}.py" for file in files]
    return ["-q", "-p", "no:cacheprovider", "--rootdir=.", *more, *paths]


def run(mutant: Mutant, tests: Sequence[str], limit: float) -> dict[str, Any]:
    """Run tests, or all of a file of them, on a mutant, and say how that ended."""
    place = COPY / mutant.module
    original = place.read_text()
    files = list(dict.fromkeys(name.split("::")[0] for name in tests))

    def work() -> int:
        sys.dont_write_bytecode = True  # what lies there is known by its size and second alone
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
        hypothesis.settings.load_profile("mutants")
        plugins = [Selection(tests)] if "::" in tests[0] else []
        return int(pytest.main(_arguments(files, "-x"), plugins=plugins))

    try:
        place.write_text(mutant.code)
        code, spent = _forked(work, limit)
    finally:
        place.write_text(original)
    ends = {None: "timeout", 0: "survived", 5: "untested"}  # 5: none of the tests was found
    output = (COPY / "output.txt").read_text(errors="replace").splitlines()
    by = [line for line in output if line.startswith(("FAILED", "ERROR"))][:1]
    return {"end": ends.get(code, "killed"), "by": by, "cpu": round(spent, 2)}


def _forked(work: Callable[[], int], limit: float) -> tuple[int | None, float]:
    """Do work in a fork, without output; return its status, None after the limit, and CPU time."""
    if not (pid := os.fork()):
        status = 70
        try:
            os.setsid()
            with (COPY / "output.txt").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            status = work()
        finally:
            os._exit(status)
    end = time.monotonic() + limit
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            usage = os.wait4(pid, 0)[2]
            return None, usage.ru_utime + usage.ru_stime
        time.sleep(0.05)
