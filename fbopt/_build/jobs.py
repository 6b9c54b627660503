"""How many compilations run at once: as many as MAX_JOBS or the cores, and the memory, allow.

A compiler that the system kills for its memory says nothing about why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fbopt._build.compiler import BuildError

ROOT = Path("/")
# Where version 2 and version 1 of control groups keep a limit and what is used of it.
LIMITS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def jobs(gigabytes_per_job: float) -> int:
    """Return the number of parallel compilations, at least 1.

    Args:
        gigabytes_per_job: the memory that one compilation takes at its peak.

    Raises:
        BuildError: MAX_JOBS is not a positive integer.
    """
    return max(1, min(_asked() or cores(), int(memory() / (gigabytes_per_job * 1e9))))


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Return how many bytes can still be taken, by the machine and by every control group."""
    return max(0, min(_free(), *_left_in_groups(), 1 << 60))


def _asked() -> int | None:
    words = os.environ.get("MAX_JOBS", "").strip()
    if words and not (words.isdecimal() and int(words) > 0):
        raise BuildError(f"MAX_JOBS is {words!r}", "set MAX_JOBS to a positive number, or unset it")
    return int(words) if words else None


def _free() -> int:
    lines = _read("proc/meminfo").splitlines()
    kilobytes = {name: value.split()[0] for name, _, value in (x.partition(":") for x in lines)}
    if "MemAvailable" in kilobytes:
        return int(kilobytes["MemAvailable"]) * 1024
    # Not Linux: all there is, which is the best that the standard library knows.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups() -> Iterator[int]:
    """Yield what the limit of each group above this process leaves."""
    for line in _read("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, used = LIMITS[1 if controllers else 2]
        # In a container the path can be the host's, and only the root of it be there.
        parts = [root, *path.strip("/").split("/")]
        for depth in range(len(parts)):
            folder = "/".join(parts[: depth + 1])
            bound, taken = (_read(f"{folder}/{name}").strip() for name in (limit, used))
            if bound.isdecimal() and taken.isdecimal():
                yield int(bound) - int(taken) + _reclaimable(f"{folder}/memory.stat")


def _reclaimable(path: str) -> int:
    """Return the bytes of cached files, which count as used but are given up when needed."""
    stat = dict(line.split(" ", 1) for line in _read(path).splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _read(path: str) -> str:
    try:
        return (ROOT / path).read_text()
    except OSError:
        return ""
