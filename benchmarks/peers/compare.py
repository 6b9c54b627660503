"""Check every contender against the reference, then time all of them, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.cases import WrongResult, require_close
from benchmarks.peers import torch_work
from benchmarks.peers.pool import Pool, Team
from benchmarks.peers.workload import Result, Workload
from benchmarks.timing import Contender, Plan, Timing, calls_for, in_turn

# Samples of a chunk, and chunks, of the check in float64.
CHECKED = {"chunk": 4, "count": 4}
# Of the gradient's norm, by precision. Rounding is magnified by BatchNorm at a ResNet's initial
# weights, and once more by the second pass: to 0.06 in float32.
TOLERANCES = {"fp64": 1e-8, "fp32": 0.1, "bf16": 0.35}
# Longer calls are not repeated to warm caches.
LONG_SECONDS = 0.5
# Of a contender's settings those that take longer than the best by this factor are not timed on.
TRIALS, HOPELESS = 3, 1.3


@dataclass(frozen=True)
class Entrant:
    """A contender with one setting of threads or processes."""

    name: str
    team: Team

    @property
    def label(self) -> str:
        return f"{self.name} ({self.team.setting})"


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


def entrants(pool: Pool, workload: Workload, wanted: Callable[[str], bool]) -> list[Entrant]:
    """Make and check all contenders: each in float64 once, and in every setting as it is timed."""
    found, small = [], workload.head(**CHECKED).double()
    exact, close, done = Expected(small), Expected(workload), set()
    for team in pool.teams:
        for name in filter(wanted, team.ask("names", workload)[0]):
            entrant = Entrant(name, team)
            checks = [(workload, close)] if name in done else [(small, exact), (workload, close)]
            for work, expected in checks:
                team.ask("make", name, work)
                expected.check(entrant.label, team.ask("result", name))
            done.add(name)
            found.append(entrant)
    return found


def compare(
    pool: Pool, workload: Workload, plan: Plan, wanted: Callable[[str], bool] = lambda name: True
) -> list[Timing]:
    """The timings of the contenders that are wanted, each with the best of its settings."""
    found, once = promising(pool, entrants(pool, workload, wanted), plan)
    seconds: list[list[float]] = [[] for _ in found]
    for i in in_turn(len(found), plan):
        seconds[i].append(take_turn(pool, found[i], once[i]))
    pool.clear()
    contenders = [Contender(entrant.label, lambda: None) for entrant in found]
    return best([Timing(c, times) for c, times in zip(contenders, seconds, strict=True)])


def take_turn(pool: Pool, entrant: Entrant, once: float = 1.0) -> float:
    """The seconds of a call that takes about `once`, while nobody else is at work."""
    pool.settle()
    return entrant.team.time(entrant.name, calls_for(once), warm=once < LONG_SECONDS)


def promising(
    pool: Pool, found: Sequence[Entrant], plan: Plan
) -> tuple[list[Entrant], list[float]]:
    """The entrants that may be the best with their name after some trials, and their times."""
    rounds = Plan(min(plan.rounds, TRIALS))
    trials: list[list[float]] = [[] for _ in found]
    for i in in_turn(len(found), rounds):
        trials[i].append(take_turn(pool, found[i]))
    once = [min(times) for times in trials]
    fastest: dict[str, float] = {}
    for entrant, seconds in zip(found, once, strict=True):
        fastest[entrant.name] = min(seconds, fastest.get(entrant.name, seconds))
    kept = [
        (entrant, seconds)
        for entrant, seconds in zip(found, once, strict=True)
        if seconds <= HOPELESS * fastest[entrant.name]
    ]
    return [entrant for entrant, _ in kept], [seconds for _, seconds in kept]


def best(timings: Sequence[Timing]) -> list[Timing]:
    """Of each contender the fastest setting, in the order of their first ones."""
    found: dict[str, Timing] = {}
    for timing in timings:
        name = timing.contender.name.rpartition(" (")[0]
        if name not in found or timing.median < found[name].median:
            found[name] = timing
    return list(found.values())
