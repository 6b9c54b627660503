"""Two clocks. `Wall` is what a caller waits for: from an idle device to an idle device. `Events` is
what the device needs: the time between two of its events, with the calls queued beforehand, so that
it never waits for the host (a call that itself waits for the device still shows that).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.devices import CPU, synchronize

Run = Callable[[], object]
# torch.cuda._sleep counts cycles: at a lower clock the queue is filled for longer, no harm.
CYCLES_PER_SECOND = 2e9
LONGEST_FILL = 0.05


class Wall:
    """Seconds by the host's clock."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def turn(self, run: Run, prepare: Run | None, calls: int) -> float:
        """The median of so many calls; the first of several finds others' data in the caches."""
        if calls > 1:
            self._once(run, prepare)
        return statistics.median(self._once(run, prepare) for _ in range(calls))

    def _once(self, run: Run, prepare: Run | None) -> float:
        if prepare is not None:
            prepare()
        synchronize(self.device)
        start = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - start


class Events:
    """Seconds by a GPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def turn(self, run: Run, prepare: Run | None, calls: int) -> float:
        """The median of so many calls; without `prepare`, the mean of calls one after the other."""
        host = self._host_seconds(run, prepare)
        if prepare is None:
            return self._span(run, None, calls, host) / calls
        return statistics.median(self._span(run, prepare, 1, host) for _ in range(calls))

    def _host_seconds(self, run: Run, prepare: Run | None) -> float:
        """How long the host takes to queue a call."""
        if prepare is not None:
            prepare()
        synchronize(self.device)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _span(self, run: Run, prepare: Run | None, calls: int, host: float) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if prepare is not None:
            prepare()
        fill = min(2 * host * calls, LONGEST_FILL)
        torch.cuda._sleep(int(fill * CYCLES_PER_SECOND))
        first.record()
        for _ in range(calls):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
