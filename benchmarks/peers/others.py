"""What programs other than the benchmark use of the processor while it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """The seconds that all cores have worked, for this machine or its host's others."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) * TICK


class Others:
    """Counts from when it is made; `own()` is the processor time of the benchmark so far."""

    def __init__(self, own: Callable[[], float]) -> None:
        self.own = own
        self.start = time.monotonic(), busy_seconds() - own()

    def share(self) -> float:
        """The share of all cores that others have used."""
        began, used = self.start
        seconds = (time.monotonic() - began) * (os.cpu_count() or 1)
        return max(0.0, (busy_seconds() - self.own() - used) / seconds)
