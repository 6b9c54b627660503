"""What a call does on a GPU, by torch's profiler: launches, the time its kernels take in all, and
where the host waits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

RANGE = "the traced call"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Trace:
    """Kernels, copies and fills that a call put on the device, their seconds, the host's waits."""

    launches: tuple[str, ...]
    busy_seconds: float
    waits: tuple[str, ...]


def trace(
    run: Callable[[], object], prepare: Callable[[], object], device: torch.device
) -> Trace | None:
    """Trace one call after an untraced one; None where the profiler sees nothing of the device."""
    if device.type != "cuda":
        return None
    for _ in range(2):
        prepare()
        torch.cuda.synchronize(device)
        found = _traced(run, device)
    return found


def _traced(run: Callable[[], object], device: torch.device) -> Trace | None:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(RANGE):
            run()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return summary(json.loads(path.read_text())["traceEvents"])


def summary(events: Sequence[dict[str, Any]]) -> Trace | None:
    """Read the events of a Chrome trace.

    All work on the device counts: it was idle before the call, and waited for after it.
    """
    work = [e for e in events if e.get("cat") in ON_DEVICE]
    span = next(
        (e for e in events if e.get("name") == RANGE and e.get("cat") == "user_annotation"), None
    )
    if span is None or not work:
        return None
    first, last = span["ts"], span["ts"] + span["dur"]
    waits = [
        e["name"]
        for e in events
        if e.get("cat") in ON_HOST and "Synchronize" in e["name"] and first <= e["ts"] <= last
    ]
    seconds = sum(e["dur"] for e in work) / 1e6
    work.sort(key=lambda e: e["ts"])
    return Trace(tuple(e["name"] for e in work), seconds, tuple(waits))


def refused_sync(run: Callable[[], object], device: torch.device) -> str | None:
    """What torch says when a call waits for the device; None for one that does not."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
