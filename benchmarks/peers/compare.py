"""Check every contender against the reference, then time all of them, interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.cases import WrongResult, require_close
from benchmarks.peers import torch_work
from benchmarks.peers.pool import Pool, Team
from benchmarks.peers.workload import LeftOut, Result, Workload
from benchmarks.timing import Contender, Plan, Table, Timing, calls_for, in_turn

# Chunks, and samples in each, of the check in float64.
CHECKED = {"chunk": 4, "count": 2}
# Of the gradient's norm, by precision; rounding is magnified by the second pass.
TOLERANCES = {"fp64": 1e-8, "fp32": 2e-2, "bf16": 0.35}
# Longer calls are not repeated to warm caches.
LONG_SECONDS = 0.5


@dataclass(frozen=True)
class Entrant:
    """A contender with one setting of threads."""

    name: str
    threads: int
    team: Team

    @property
    def label(self) -> str:
        return f"{self.name} ({self.threads} thread{'s' * (self.threads > 1)})"

    def time(self, calls: int, warm: bool = True) -> float:
        """The seconds of a call."""
        (seconds,) = self.team.ask("time", self.name, calls, warm)
        return seconds


class Expected:
    """What the reference finds for a workload, in its precision."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.task = workload, torch_work.task(workload)

    @cached_property
    def loss(self) -> float:
        losses = [self.task.gradient(*chunk)[0] for chunk in self.task.chunks]
        return torch.stack(losses).mean().item()

    def check(self, label: str, results: Sequence[Result | None]) -> None:
        """Raise WrongResult unless all of the results are close."""
        tolerance, names = TOLERANCES[self.workload.precision], list(self.workload.weights)
        for found in results:
            if found is None:
                continue
            grads = [torch.from_numpy(found.grads[name].copy()) for name in names]
            require_close(label, "the gradient", grads, self.task.expected, tolerance, norm=2)
            if not abs(found.loss - self.loss) <= tolerance * abs(self.loss):
                raise WrongResult(f"{label}: the loss is {found.loss}, expected {self.loss}")


def entrants(pool: Pool, workload: Workload) -> list[Entrant]:
    """Make and check all contenders; those that cannot run here are named with the reason."""
    found, small = [], workload.head(**CHECKED).double()
    exact, close = Expected(small), Expected(workload)
    for (_, threads), team in pool.teams.items():
        for name in team.ask("names", workload)[0]:
            entrant = Entrant(name, threads, team)
            try:
                for work, expected in ((small, exact), (workload, close)):
                    team.ask("make", name, work)
                    expected.check(entrant.label, team.ask("result", name))
            except LeftOut as reason:
                print(f"{entrant.label} is left out: {reason}")
            else:
                found.append(entrant)
    return found


def compare(pool: Pool, workload: Workload, plan: Plan) -> list[Timing]:
    """The timings of all contenders with all settings of threads."""
    found = entrants(pool, workload)
    once = [entrant.time(1) for entrant in found]
    seconds: list[list[float]] = [[] for _ in found]
    for i in in_turn(len(found), plan):
        pool.settle()
        seconds[i].append(found[i].time(calls_for(once[i]), warm=once[i] < LONG_SECONDS))
    pool.clear()
    contenders = [Contender(entrant.label, lambda: None) for entrant in found]
    return [Timing(c, times) for c, times in zip(contenders, seconds, strict=True)]


def best_threads(timings: Sequence[Timing]) -> list[Timing]:
    """Of each contender the faster setting."""
    best: dict[str, Timing] = {}
    for timing in timings:
        name = timing.contender.name.rpartition(" (")[0]
        if name not in best or timing.median < best[name].median:
            best[name] = timing
    return list(best.values())


def table(title: str, timings: Sequence[Timing]) -> Table:
    """The table of a workload."""
    return Table(f"Penalised gradient, {title}", best_threads(timings))
