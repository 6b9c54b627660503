"""Workers, and that all of them are idle before one is asked to work."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Pipe, wait
from typing import Any

# Idle threads of OpenMP and XLA spin for some milliseconds before they block.
IDLE_SHARE, LOOK_SECONDS, PATIENCE_SECONDS = 0.02, 0.02, 10.0


class Worker:
    """A process with its own cores and as many threads; every message gets one answer."""

    def __init__(self, kind: str, cores: Sequence[int], **environment: str) -> None:
        self.label = f"{kind} on {'one core' if len(cores) == 1 else f'{len(cores)} cores'}"
        self.connection, theirs = Pipe()
        place = [str(theirs.fileno()), ",".join(map(str, cores))]
        command = [sys.executable, "-m", "benchmarks.peers.worker", kind, *place]
        threads = {"OMP_NUM_THREADS": str(len(cores)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        given = os.environ | threads | environment
        self.process = subprocess.Popen(command, env=given, pass_fds=[theirs.fileno()])
        theirs.close()

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended, as receive finds
            self.connection.send(message)

    def receive(self) -> Any:
        """The answer; raises RuntimeError with what went wrong there."""
        try:
            done, answer = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the worker {self.label} has ended") from None
        if not done:
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
            self.process.wait()


class Team:
    """Workers that do one work together; usually one."""

    def __init__(self, workers: Sequence[Worker], setting: str) -> None:
        self.workers, self.setting = workers, setting

    def ask(self, *message: Any) -> list[Any]:
        """Their answers, once all have answered or one has failed."""
        for worker in self.workers:
            worker.send(*message)
        waiting = {worker.connection: worker for worker in self.workers}
        answers = {}
        while waiting:
            for connection in wait(list(waiting)):
                worker = waiting.pop(connection)
                answers[worker.connection] = worker.receive()
        return [answers[worker.connection] for worker in self.workers]

    def time(self, name: str, calls: int, warm: bool) -> float:
        """The seconds of a call; of several workers from the request to the last answer."""
        if len(self.workers) == 1:
            return self.ask("time", name, calls, warm)[0]
        if warm:
            self.ask("time", name, 1, False)
        start = time.perf_counter()
        self.ask("time", name, calls, False)
        return (time.perf_counter() - start) / calls


class Pool:
    """All teams."""

    def __init__(self, teams: Sequence[Team]) -> None:
        self.teams = teams

    @property
    def workers(self) -> list[Worker]:
        return [worker for team in self.teams for worker in team.workers]

    def cpu_seconds(self) -> float:
        """Processor time so far, of this process too."""
        return time.process_time() + sum(self._used())

    def clear(self) -> None:
        """Drop all contenders."""
        for team in self.teams:
            team.ask("clear")

    def settle(self) -> None:
        """Wait until no worker uses a core."""
        limit = time.monotonic() + PATIENCE_SECONDS
        while True:
            before, start = self._used(), time.monotonic()
            time.sleep(LOOK_SECONDS)
            seconds = time.monotonic() - start
            shares = [(b - a) / seconds for a, b in zip(before, self._used(), strict=True)]
            if max(shares) < IDLE_SHARE:
                return
            if time.monotonic() > limit:
                worst = self.workers[shares.index(max(shares))].label
                raise RuntimeError(f"{worst}: uses {max(shares):.0%} of a core when it has no work")

    def _used(self) -> list[float]:
        return [worker.cpu_seconds() for worker in self.workers]


@contextlib.contextmanager
def pool(cores: Sequence[int], kinds: Sequence[str], ranks: Sequence[int] = ()) -> Iterator[Pool]:
    """Start workers: of every kind one on a single core and one on all, and teams of `ranks`.

    Every rank has a core of its own.
    """
    teams = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def started(kind: str, places: Sequence[int], **environment: str) -> Worker:
            worker = Worker(kind, places, **environment)
            stack.callback(worker.close)
            return worker

        for kind in kinds:
            for count in sorted({1, len(cores)}):
                setting = f"{count} thread{'s' * (count > 1)}"
                teams.append(Team([started(kind, cores[:count])], setting))
        for size in ranks:
            given = {"WORLD_SIZE": str(size), "PEERS_STORE": f"{folder}/{size}"}
            each = enumerate(cores[:size])
            team = [started("ranks", [core], RANK=str(rank), **given) for rank, core in each]
            teams.append(Team(team, "1 thread each" if size > 1 else "1 thread"))
        yield Pool(teams)
