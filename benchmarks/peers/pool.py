"""Workers, and that all of them are idle before one is asked to work."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Pipe
from typing import Any

from benchmarks.peers.workload import LeftOut

# Idle threads of OpenMP and XLA spin for some milliseconds before they block.
IDLE_SHARE, LOOK_SECONDS, PATIENCE_SECONDS = 0.02, 0.02, 10.0


class Worker:
    """A process with its own cores and as many threads; every message gets one answer."""

    def __init__(self, kind: str, cores: Sequence[int], **environment: str) -> None:
        self.label = f"{kind} with {len(cores)} threads"
        self.connection, theirs = Pipe()
        place = [str(theirs.fileno()), ",".join(map(str, cores))]
        command = [sys.executable, "-m", "benchmarks.peers.worker", kind, *place]
        given = os.environ | {"OMP_NUM_THREADS": str(len(cores))} | environment
        self.process = subprocess.Popen(command, env=given, pass_fds=[theirs.fileno()])
        theirs.close()

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended, as receive finds
            self.connection.send(message)

    def receive(self) -> Any:
        """The answer; raises LeftOut, or RuntimeError with what went wrong there."""
        try:
            how, answer = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the worker {self.label} has ended") from None
        if how == "left out":
            raise LeftOut(answer)
        if how == "failed":
            raise RuntimeError(f"the worker {self.label} failed:\n{answer}")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time so far, of all threads; the clock's number as in clock_getcpuclockid."""
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def close(self) -> None:
        self.connection.close()
        try:
            self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Team:
    """Workers that do one work together."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers

    def ask(self, *message: Any) -> list[Any]:
        """Their answers, once all have answered."""
        for worker in self.workers:
            worker.send(*message)
        return [worker.receive() for worker in self.workers]


class Pool:
    """All workers, by kind."""

    def __init__(self, teams: dict[tuple[str, int], Team]) -> None:
        self.teams = teams

    @property
    def workers(self) -> list[Worker]:
        return [worker for team in self.teams.values() for worker in team.workers]

    def clear(self) -> None:
        """Drop all contenders."""
        for team in self.teams.values():
            team.ask("clear")

    def settle(self) -> None:
        """Wait until no worker uses a core."""
        limit = time.monotonic() + PATIENCE_SECONDS
        while True:
            before, start = self._used(), time.monotonic()
            time.sleep(LOOK_SECONDS)
            shares = self._shares(before, time.monotonic() - start)
            if max(shares) < IDLE_SHARE:
                return
            if time.monotonic() > limit:
                worst = self.workers[shares.index(max(shares))].label
                raise RuntimeError(f"{worst}: uses {max(shares):.0%} of a core when it has no work")

    def _used(self) -> list[float]:
        return [worker.cpu_seconds() for worker in self.workers]

    def _shares(self, before: list[float], seconds: float) -> list[float]:
        return [(b - a) / seconds for a, b in zip(before, self._used(), strict=True)]


@contextlib.contextmanager
def pool(cores: Sequence[int], kinds: Sequence[str]) -> Iterator[Pool]:
    """For every kind a worker on one core, and one on all."""
    teams: dict[tuple[str, int], Team] = {}
    with contextlib.ExitStack() as stack:

        def started(kind: str, places: Sequence[int], **environment: str) -> Worker:
            worker = Worker(kind, places, **environment)
            stack.callback(worker.close)
            return worker

        for kind in kinds:
            for count in sorted({1, len(cores)}):
                teams[kind, count] = Team([started(kind, cores[:count])])
        yield Pool(teams)
