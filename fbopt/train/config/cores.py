"""The physical cores that this process may use: by its affinity and the quota of its cgroup."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def usable_cores(cpus: Iterable[int] | None = None, root: Path = Path("/")) -> int:
    """Return how many physical cores this process may use, at least 1.

    Two hyperthreads are one core. A quota of 2.5 cores' time is two cores.

    Args:
        cpus: the processors as the system numbers them, by default those of the affinity.
        root: where the folders proc and sys are.
    """
    if cpus is None:
        affinity = getattr(os, "sched_getaffinity", None)  # missing on macOS
        cpus = affinity(0) if affinity else range(os.cpu_count() or 1)
    cores = len({_siblings(cpu, root) for cpu in cpus})
    return max(1, math.floor(min([cores, *_quotas(root)])))


def _siblings(cpu: int, root: Path) -> str:
    """The hyperthreads of a processor's core, itself included; itself where that is not known."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # in newer and in older kernels
        if (siblings := _read(topology / name)) is not None:
            return siblings
    return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """The cores' worth of time that each of this process's cgroups allows, where it has a limit."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup" / controllers  # version 2 names no controllers
        group = top / path.strip("/")
        # A container sees its own group as the top one, and often not by this path.
        for folder in (group, *group.parents) if group != top else (top,):
            if not controllers:
                yield from _quota(*(_read(folder / "cpu.max") or "").split())
            elif "cpu" in controllers.split(","):
                limits = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
                yield from _quota(*(limit or "" for limit in limits))
            if folder == top:
                break


def _quota(quota: str = "", period: str = "") -> Iterator[float]:
    """Microseconds of computing per period; "max" or -1 is no limit."""
    if quota.isdecimal() and period.isdecimal():
        yield int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
