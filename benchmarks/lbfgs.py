"""L-BFGS: evaluations and time to the same loss, and the time of an iteration, closure excluded.

    python -m benchmarks.lbfgs [--parts evaluations iteration direction] [--quick]

Evaluations: fbopt's line searches, torch.optim.LBFGS and scipy's L-BFGS-B, each with 10 pairs, from
the same starts (`--seeds`), until an evaluation finds the loss; medians over the starts. Iteration:
whole steps of one million float32 parameters and 100 pairs, less the time in the closure, after a
check that both optimizers take the same steps. Direction: the two kernels and the two loops.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bandwidth import limits
from benchmarks.cases import require_close
from benchmarks.lbfgs_problems import PROBLEMS, Problem
from benchmarks.report import Report, aligned, options
from benchmarks.timing import CPU, Contender, Plan, Table, Timing, in_turn, measure
from fbopt import LBFGS, reference
from fbopt._ops import dispatch

PARTS = ("evaluations", "iteration", "direction")
PAIRS, MOST = 10, 5_000
SIZE, HISTORY = 1_000_000, 100
OURS = "fbopt.LBFGS"


class Reached(Exception):
    """The loss has been found."""


class Watched:
    """A problem's closure, which counts until the loss is reached."""

    def __init__(self, problem: Problem, seed: int, target: float, most: int) -> None:
        self.params, self._loss = problem.make(seed)
        self._target, self._most = target, most
        self.count, self.least = 0, float("inf")

    def __call__(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = self._loss()
        loss.backward()
        self.count += 1
        self.least = min(self.least, loss.item())
        if loss.item() <= self._target or self.count >= self._most:
            raise Reached
        return loss.detach()


def by_fbopt(closure: Watched, search: str) -> None:
    limits = {"max_iter": MOST, "max_eval": MOST, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    LBFGS(closure.params, line_search=search, history_size=PAIRS, **limits).step(closure)


def by_torch(closure: Watched) -> None:
    limits = {"max_iter": MOST, "max_eval": MOST, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    torch.optim.LBFGS(
        closure.params, history_size=PAIRS, line_search_fn="strong_wolfe", **limits
    ).step(closure)


def by_scipy(closure: Watched) -> None:
    from scipy.optimize import minimize

    def function(x: Any) -> tuple[float, Any]:
        with torch.no_grad():
            nn.utils.vector_to_parameters(torch.from_numpy(x), closure.params)
        loss = closure()
        return loss.item(), nn.utils.parameters_to_vector([p.grad for p in closure.params]).numpy()

    start = nn.utils.parameters_to_vector(closure.params).detach().numpy()
    limits = {"maxiter": MOST, "maxfun": MOST, "ftol": 0.0, "gtol": 0.0, "maxcor": PAIRS}
    minimize(function, start, jac=True, method="L-BFGS-B", options=limits)


METHODS: dict[str, Callable[[Watched], None]] = {
    f"{OURS}, strong Wolfe": partial(by_fbopt, search="strong_wolfe"),
    f"{OURS}, Armijo": partial(by_fbopt, search="armijo"),
    f"{OURS}, non-monotone": partial(by_fbopt, search="nonmonotone"),
    "torch.optim.LBFGS, strong Wolfe": by_torch,
    "scipy, L-BFGS-B": by_scipy,
}


def attempt(
    problem: Problem,
    seed: int,
    target: float,
    method: Callable[[Watched], None],
    most: int = MOST,
) -> tuple[int, float, float]:
    """Run a method; return evaluations and seconds, with the least loss."""
    closure = Watched(problem, seed, target, most)
    start = time.perf_counter()
    with contextlib.suppress(Reached):
        method(closure)
    return closure.count, time.perf_counter() - start, closure.least


def least(problem: Problem) -> float:
    """The least loss that the methods find, of a convex problem."""
    runs = (attempt(problem, 0, -1.0, method, 1500) for method in (by_torch, by_scipy))
    return min(value for _, _, value in runs)


def evaluations(name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Compare all methods on a problem; print a table."""
    problem = PROBLEMS[name]
    target = problem.target or least(problem) + 1e-5
    found: dict[str, list[tuple[int, float, float]]] = {method: [] for method in METHODS}
    for seed in seeds:
        for method, run in METHODS.items():
            found[method].append(attempt(problem, seed, target, run))
    rows, base = [], found[next(iter(METHODS))]
    for method, runs in found.items():
        rows.append(
            {
                "name": method,
                "evaluations": [count for count, _, _ in runs],
                "reached": sum(value <= target for _, _, value in runs),
                "ratio": statistics.median(
                    run[1] / ours[1] for run, ours in zip(runs, base, strict=True)
                ),
            }
        )
    print(f"\n### {problem.title}, n = {len(seeds)}\n")
    lines = [["", "reached", "median evaluations", "their range", "ratio of times to the first"]]
    for row in rows:
        counts = row["evaluations"]
        cells = [f"{row['reached']} of {len(seeds)}", f"{statistics.median(counts):.0f}"]
        cells += [f"{min(counts)} – {max(counts)}", f"{row['ratio']:.2f}"]
        lines.append([row["name"], *cells])
    print(aligned(lines), flush=True)
    return rows


class Quadratic:
    """sum_i a_i x_i^2 / 2 with a from 0.001 to 1,000, and its closure's time."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        powers = 6 * torch.rand(size, generator=generator, dtype=torch.float64) - 3
        self._a = (10**powers).to(dtype)
        self.x = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
        self.x.grad, self.seconds = torch.zeros_like(self.x), 0.0

    def __call__(self) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            torch.mul(self._a, self.x, out=self.x.grad)
            value = self.x.dot(self.x.grad).item() / 2
        self.seconds += time.perf_counter() - start
        return value


def iterating(kind: str, size: int, dtype: torch.dtype) -> tuple[Quadratic, Any]:
    """An optimizer without a search that makes one iteration a step; both begin at one length."""
    problem = Quadratic(size, dtype)
    given: Any = {"max_iter": 1, "history_size": HISTORY, "tolerance_change": 0.0}
    given |= {"tolerance_grad": 0.0}
    problem()
    norm = problem.x.grad.norm(1 if kind == "torch" else 2).item()
    first = 1e-3 * max(1.0, norm)
    if kind == "torch":
        optimizer: Any = torch.optim.LBFGS([problem.x], lr=first, **given)
    else:
        optimizer = LBFGS([problem.x], lr=first, line_search=None, **given)
    optimizer.step(problem)
    optimizer.param_groups[0]["lr"] = 1.0
    return problem, optimizer


def check_iterations() -> None:
    """Both take the same steps, in float64, as long as rounding lets them."""
    pairs = [iterating(kind, 1000, torch.float64) for kind in ("ours", "torch")]
    for problem, optimizer in pairs:
        for _ in range(30):
            optimizer.step(problem)
    require_close(OURS, "the 31st iterate", [pairs[0][0].x], [pairs[1][0].x], 1e-4)


def iteration(rounds: int, size: int) -> tuple[Table, dict[str, float]]:
    """Time steps with a full history, side by side; return words of memory, too."""
    check_iterations()
    names = {"ours": OURS, "torch": "torch.optim.LBFGS"}
    contenders = {kind: iterating(kind, size, torch.float32) for kind in names}
    for problem, optimizer in contenders.values():
        for _ in range(HISTORY + 2):
            optimizer.step(problem)
    turns: dict[str, list[float]] = {kind: [] for kind in names}
    for i in in_turn(len(names), Plan(rounds)):
        kind = list(names)[i]
        problem, optimizer = contenders[kind]
        start, before = time.perf_counter(), problem.seconds
        optimizer.step(problem)
        turns[kind].append(time.perf_counter() - start - (problem.seconds - before))
    rows = [Timing(Contender(names[kind], lambda: None), times) for kind, times in turns.items()]
    method = contenders["ours"][1]._method
    held = [*method._history.matrices, *method._line._matrices]
    state = contenders["torch"][1].state[contenders["torch"][0].x]
    kept = [*state["old_dirs"], *state["old_stps"], state["d"], state["prev_flat_grad"]]
    assert len(state["old_dirs"]) == HISTORY == method._history.count
    words = {names["ours"]: sum(t.numel() for t in held) / size}
    words[names["torch"]] = sum(t.numel() for t in kept) / size
    title = f"An iteration of {size:,} parameters with {HISTORY} pairs, closure excluded"
    return Table(title, rows), words


class Directions:
    """A full history of random pairs, and the direction by two passes and by two loops."""

    def __init__(self, size: int) -> None:
        self.rows = torch.randn(1 + 2 * HISTORY, size)
        self.coefficients = torch.randn(len(self.rows), dtype=torch.float64)
        self.products = torch.empty(2, len(self.rows), dtype=torch.float64)
        self.out = torch.empty(size)

    def kernels(self, ops: Any = dispatch) -> None:
        ops.row_products_(self.products, self.rows, self.rows[0], self.rows[-1])
        ops.combine_rows_(self.out, self.rows, self.coefficients)

    def loops(self) -> None:
        """The reads and writes of torch's own; numbers that do not blow up."""
        q, found = self.rows[0].neg(), []
        for i in range(HISTORY, 0, -1):
            s, y = self.rows[2 * i - 1], self.rows[2 * i]
            found.append(s.dot(q) * 1e-9)
            q.add_(y, alpha=-found[-1])
        r = q.mul(0.5)
        for s, y in zip(self.rows[1::2], self.rows[2::2], strict=True):
            r.add_(s, alpha=found.pop() - y.dot(r) * 1e-9)


def direction(plan: Plan, size: int) -> Table:
    """Time the passes over the pairs alone."""
    case, small = Directions(size), Directions(5000)
    small.kernels()
    found = small.products.clone(), small.out.clone()
    small.kernels(reference)
    require_close("row_products_", "the products", [found[0]], [small.products], 1e-12)
    require_close("combine_rows_", "the combination", [found[1]], [small.out], 1e-6)
    words = (4 * HISTORY + 5) * size
    contenders = [
        Contender("two passes (the kernels)", case.kernels, words),
        Contender("two loops (torch)", case.loops, 10 * HISTORY * size),
        *limits(words, CPU),
    ]
    return measure(f"The direction alone, {size:,} parameters, {HISTORY} pairs", contenders, plan)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=5, help="starts of each problem")
    choice = parser.parse_args(argv)
    report = Report("lbfgs", choice, argv)
    rounds = choice.rounds or (3 if choice.quick else 15)
    size = 20_000 if choice.quick else SIZE
    seeds = range(1 if choice.quick else choice.seeds)
    if "evaluations" in choice.parts:
        problems = ["rosenbrock"] if choice.quick else choice.problems
        report.facts["evaluations"] = {name: evaluations(name, seeds) for name in problems}
    if "iteration" in choice.parts:
        table, report.facts["words_per_parameter"] = iteration(rounds, size)
        report.table(table)
        print(f"words per parameter: {report.facts['words_per_parameter']}")
    if "direction" in choice.parts:
        report.table(direction(Plan(rounds, seconds=choice.seconds), size))
    return report.write(choice.out)


if __name__ == "__main__":
    main()
