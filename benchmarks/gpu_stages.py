"""Stages of the GPU check that are not benchmarks: build the kernels, run their tests, sanitize.

    python -m benchmarks.gpu_stages build|tests|sanitize [--device cpu] [--seconds N]

The exit status is 0, 1 for a finding, and 77 if this machine lacks what the stage needs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sanitized import AGREED
from fbopt._build import load

ROOT = Path(__file__).parents[1]
UNAVAILABLE = 77
CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
CAPTURED |= {"stdin": subprocess.DEVNULL, "text": True, "errors": "replace"}
# pyproject's own options name plugins that a machine may lack. A file that cannot be imported
# counts as an error and does not keep the others from running.
PYTEST = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rfE"]
PYTEST += ["--continue-on-collection-errors", f"--rootdir={ROOT}"]
TESTS = {"cuda": ["-m", "cuda", f"{ROOT}/tests"], "cpu": [f"{ROOT}/tests/ops/test_buckets.py"]}

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")
# torch probes for what a driver has, so failed API calls are expected.
OPTIONS = ("--error-exitcode", "86", "--report-api-errors", "no", "--print-limit", "20")
OPTIONS += ("--target-processes", "application-only")  # not compilers run for their version
DRIVER = (sys.executable, "-m", "benchmarks.sanitized")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def build(device: str, seconds: float) -> int:
    """Compile or find the kernels, and tell how long it takes."""
    subprocess.run([sys.executable, "-m", "fbopt.cli", "doctor"], check=False)
    kinds = {"CPU": load.kernels} | ({"CUDA": load.cuda_kernels} if device == "cuda" else {})
    for name, kernels in kinds.items():
        start = time.perf_counter()
        module = kernels()
        if module is None:
            print(f"there are no {name} kernels: fbopt doctor says why")
            return 1
        architectures = getattr(module, "architectures", "this processor")
        print(f"{name} kernels for {architectures}: {time.perf_counter() - start:.1f} s")
    return 0


class Passed:
    """A plugin of pytest that counts the tests that pass."""

    def __init__(self) -> None:
        self.count = 0

    def pytest_runtest_logreport(self, report: object) -> None:
        self.count += report.when == "call" and report.passed


def tests(device: str, seconds: float, select: Sequence[str] | None = None) -> int:
    """Run the tests marked cuda; if all are skipped, nothing is shown, and that fails."""
    import pytest

    passed = Passed()
    status = pytest.main([*PYTEST, *(select or TESTS[device])], plugins=[passed])
    print(f"{passed.count} tests passed, pytest's exit status is {int(status)}")
    return int(status != 0 or passed.count == 0)


def sanitize(device: str, seconds: float) -> int:
    """Run compute-sanitizer's tools over benchmarks.sanitized; without a GPU, the driver alone.

    A planted error comes first: a tool that does not see it sees nothing.
    """
    if device == "cpu":
        return subprocess.run([*DRIVER, "--device", "cpu"], check=False).returncode
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [os.path.join(home, name) for name in ("bin", TOOL)]
    tool = shutil.which(TOOL, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]))
    if tool is None:
        print(f"{TOOL} is neither on the PATH nor in {' or '.join(folders)}")
        return UNAVAILABLE
    deadline = time.monotonic() + seconds
    load.cuda_kernels()  # compiled before anything watches
    planted = finding(tool, "memcheck", seconds / 5, "--plant")
    print(f"memcheck, a planted write out of bounds: {planted}", flush=True)
    if planted == "not supported":
        return UNAVAILABLE
    clean = planted.endswith("errors")
    for done, check in enumerate(CHECKS):
        left = (deadline - time.monotonic()) / (len(CHECKS) - done)
        found = finding(tool, check, max(1.0, left))
        print(f"{check}: {found}", flush=True)
        clean &= found == "clean"
    return int(not clean)


def finding(tool: str, check: str, seconds: float, *arguments: str) -> str:
    """What a tool says of the driver: clean, a number of errors, or why there is no answer."""
    # memcheck only sees an overrun into the next allocation if there is room between the two; the
    # other tools watch fbopt's kernels alone, not torch's.
    own = ("--padding", "512") if check == "memcheck" else ("--kernel-regex", "kns=fbopt")
    command = [tool, "--tool", check, *OPTIONS, *own, *DRIVER, *arguments]
    try:
        done = subprocess.run(command, timeout=seconds, **CAPTURED)
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    found = judge(done.returncode, done.stdout)
    if found != "clean":
        print("\n".join(done.stdout.splitlines()[-40:]), flush=True)
    return found


def judge(status: int, output: str) -> str:
    """Read a tool's exit status and output."""
    if "Device not supported" in output:
        return "not supported"
    counts = [int(count) for count in SUMMARY.findall(output)]
    if any(counts):
        return f"{sum(counts)} errors"
    # The tools count no errors, too, where they saw no kernel, or the program crashed.
    if not counts or status != 0 or AGREED not in output:
        return f"no result, exit status {status}"
    return "clean"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage."""
    stages = {stage.__name__: stage for stage in (build, tests, sanitize)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=480, help="limit for all of sanitize")
    choice = parser.parse_args(argv)
    return stages[choice.stage](choice.device, choice.seconds)


if __name__ == "__main__":
    sys.exit(main())
