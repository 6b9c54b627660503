"""Stage `build`: what is here, what fbopt says of it, and how long the kernels take to compile."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from benchmarks.gpu import Settings, StageFailed
from benchmarks.report import Report
from fbopt._build import load as _build

DOCTOR_SECONDS = 120


def run(report: Report, settings: Settings) -> None:
    """Compile or find both libraries, and state what they were built for."""
    report.fact("fbopt doctor", _doctor())
    _timed(report, "CPU kernels", _build.find_kernels, _build.kernels)
    if settings.rehearsal:
        return
    kernels = _timed(report, "CUDA kernels", _build.find_cuda, _build.cuda_kernels)
    for what in ("architectures", "cuda_version"):
        report.fact(f"CUDA kernels, {what.replace('_', ' ')}", getattr(kernels, what))


def _timed(
    report: Report,
    what: str,
    find: Callable[[], Path | None],
    load: Callable[[], ModuleType | None],
) -> ModuleType:
    verb = "loaded" if find() else "compiled and loaded"
    start = time.perf_counter()
    module = load()
    if module is None:
        raise StageFailed(f"there are no {what}: fbopt doctor says why")
    report.fact(what, f"{verb} in {time.perf_counter() - start:.1f} s")
    return module


def _doctor() -> str:
    command = [sys.executable, "-m", "fbopt.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DOCTOR_SECONDS)
    return (done.stdout + done.stderr).strip()
