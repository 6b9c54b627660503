"""A worker process, which makes, calls and times contenders when it is asked to.

python -m benchmarks.peers.worker KIND DESCRIPTOR CORES, where benchmarks.peers.KIND_calls has the
contenders and DESCRIPTOR is the worker's end of a pipe, at which it waits, blocked, in between.
"""

from __future__ import annotations

import gc
import importlib
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Protocol

from benchmarks.peers.workload import Result, Workload
from fbopt.train.malloc import keep_freed


class Call(Protocol):
    """A contender: a call is one penalised gradient, complete when it returns."""

    def __call__(self) -> object: ...

    def result(self) -> Result | None:
        """Call, and return what it leaves; None for bare passes."""


class Desk:
    """What a worker can be asked."""

    def __init__(
        self,
        contenders: Callable[[Workload], dict[str, Callable[[], Call]]],
        forget: Callable[[], object],
    ) -> None:
        self.contenders, self.forget = contenders, forget
        self.calls: dict[str, Call] = {}

    def names(self, workload: Workload) -> list[str]:
        """The contenders for a workload."""
        return list(self.contenders(workload))

    def make(self, name: str, workload: Workload) -> None:
        """Make a contender, in place of one of the same name."""
        self.calls.pop(name, None)
        self.calls[name] = self.contenders(workload)[name]()

    def result(self, name: str) -> Result | None:
        """What a call leaves."""
        return self.calls[name].result()

    def time(self, name: str, calls: int, warm: bool) -> float:
        """The median seconds of some calls; `warm`: one more comes first."""
        call, seconds = self.calls[name], []
        gc.disable()
        try:
            if warm:
                call()
            for _ in range(calls):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        finally:
            gc.enable()
        return statistics.median(seconds)

    def clear(self) -> None:
        """Drop all contenders and what was compiled for them."""
        self.calls.clear()
        self.forget()
        gc.collect()


def serve(desk: Desk, connection: Connection) -> None:
    """Answer until the other end is closed."""
    while True:
        try:
            verb, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(desk, verb)(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def main(argv: Sequence[str]) -> None:
    """Take the cores, and only then import what starts threads."""
    kind, descriptor, cores = argv
    os.sched_setaffinity(0, map(int, cores.split(",")))
    keep_freed()  # in all workers alike
    module = importlib.import_module(f"benchmarks.peers.{kind}_calls")
    serve(Desk(module.contenders, module.forget), Connection(int(descriptor)))


if __name__ == "__main__":
    main(sys.argv[1:])
