"""Whether a run of a ladder computes: by the processor time of its processes. Linux alone."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

SHARE = 0.01  # of a processor, below which nothing is computed


class Activity:
    """For how long a process, with all that it has started, has computed nothing."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.used, self.since = processor_seconds(pid), time.monotonic()

    def idle_seconds(self) -> float:
        """The seconds since it was last seen to compute; 0 where that cannot be known."""
        now, used = time.monotonic(), processor_seconds(self.pid)
        if used is None or self.used is None or abs(used - self.used) > SHARE * (now - self.since):
            self.used, self.since = used, now
        return now - self.since


def processor_seconds(pid: int) -> float | None:
    """What a process and its descendants have used of processors; None on other systems."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            own = int(path.parent.name)
            # proc(5): the parent's number; user and system time, its own and of ended children
            parents[own], used[own] = int(fields[1]), sum(map(int, fields[11:15]))
    if pid not in used:
        return None
    family = {pid}
    while more := {own for own, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used[own] for own in family) / os.sysconf("SC_CLK_TCK")
