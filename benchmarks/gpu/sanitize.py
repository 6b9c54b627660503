"""Stage `sanitize`: compute-sanitizer's tools over benchmarks.sanitized. A planted fault comes
first: a tool that does not see it sees nothing, whatever it says of the rest.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from benchmarks import processes
from benchmarks.gpu import Settings, StageFailed, Unavailable
from benchmarks.processes import Finished
from benchmarks.report import Report
from benchmarks.sanitized import AGREED, UNCACHED
from fbopt._build import load as _build
from fbopt._build import toolkit as _toolkit
from fbopt._build.compiler import BuildError

TOOL = "compute-sanitizer"
# The first two are what is asked for; the others follow if there is time.
CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERROR_STATUS = 86
# Errors of API calls are torch's own business: it probes for what a driver has. What compilers are
# asked for their version is none of ours.
OPTIONS = ("--error-exitcode", str(ERROR_STATUS), "--report-api-errors", "no")
OPTIONS += ("--print-limit", "20", "--target-processes", "application-only")
# An overrun into the next allocation is seen only if there is room between them. The other tools
# watch our kernels alone: what they say of torch's own is not for us to mend.
ONLY_OURS = ("--kernel-regex", "kns=fbopt")
OF_TOOL = {"memcheck": ("--padding", "512")}
SCRIPT = (sys.executable, "-m", "benchmarks.sanitized")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
CLEAN = "clean"
TAIL = 12


def run(report: Report, settings: Settings) -> None:
    """Run the tools and report each one's finding; the parity run alone in a rehearsal."""
    if settings.rehearsal:
        done = processes.run([*SCRIPT, "--device", "cpu"], settings.left())
        report.fact("parity run without a sanitizer", done.last)
        if done.status != 0:
            raise StageFailed(f"the parity run ended with status {done.status}")
        return
    tool = find()
    report.fact(TOOL, tool)
    _build.cuda_kernels()  # compiled before anything watches
    planted = _finding(tool, "memcheck", settings.left() / 4, "--plant")
    report.fact("memcheck, a planted write out of bounds", planted)
    if not re.fullmatch(r"\d+ errors", planted):
        raise StageFailed("memcheck does not see a planted fault")
    findings = {}
    for position, check in enumerate(CHECKS):
        findings[check] = _finding(tool, check, settings.left() / (len(CHECKS) - position))
        report.fact(check, findings[check])
    if wrong := [check for check, found in findings.items() if found != CLEAN]:
        raise StageFailed(f"{', '.join(wrong)}: not clean")


def find() -> Path:
    """Return the tool: on the PATH, under CUDA_HOME, or in the toolkit that fbopt builds with.

    Raises:
        Unavailable: it is in none of these.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    try:
        homes.append(_toolkit.toolkit().home)
    except BuildError as error:
        print(f"no toolkit to look in: {error}")
    folders = [Path(home, sub) for home in homes if home for sub in ("bin", TOOL)]
    for folder in (None, *folders):
        if path := shutil.which(TOOL, path=folder):
            return Path(path)
    looked = ", ".join(["the PATH", *map(str, folders)])
    raise Unavailable(f"{TOOL} not found (looked on {looked})")


def judge(done: Finished) -> str:
    """What a tool found, from its exit status and its words."""
    if "Device not supported" in done.output:
        raise Unavailable(f"{TOOL}: device not supported here")
    if done.status is None:
        return "not finished in time"
    counts = [int(count) for count in SUMMARY.findall(done.output)]
    if not counts:
        return f"no summary (exit status {done.status}): {done.last}"
    if any(counts):
        return f"{sum(counts)} errors"
    # The tools count no errors, too, where they saw no kernel, or the program crashed.
    if done.status != 0 or AGREED not in done.output:
        return f"the parity run failed (exit status {done.status}): {done.last}"
    return CLEAN


def _finding(tool: Path, check: str, seconds: float, *arguments: str) -> str:
    environment = {**os.environ, UNCACHED: "1"}
    options = (*OPTIONS, *OF_TOOL.get(check, ONLY_OURS))
    command = [str(tool), "--tool", check, *options, *SCRIPT, *arguments]
    done = processes.run(command, seconds, environment, echo=False)
    print("\n".join(done.output.splitlines()[-TAIL:]), flush=True)
    return judge(done)
