"""The library's share of a step: the penalised chunk update, the finishing step, single kernels.

    python -m benchmarks.ops [--sizes resnet18 small-cnn tiny] [--no-compile] [--quick]

Every contender is checked against fbopt.reference in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import finishing, rivals
from benchmarks.cases import SIZES, TITLES, Chunk, Finish, require_close, shapes
from benchmarks.devices import Eviction
from benchmarks.harness import Contender, Plan, Timing, Timings, measure
from benchmarks.memory import is_limit, limits
from benchmarks.report import Report, arguments, options
from benchmarks.single import copies, sets_for, single_ops

ROUNDS = {"resnet18": 40, "small-cnn": 60, "tiny": 60}
QUICK_ROUNDS = 3
COMPILED = ("resnet18", "small-cnn")
GOALS = {
    "resnet18": {
        "foreach": 1.5,
        "published": 6,
        "exact": 1.3,
        "limit": 0.85,
        "SGD foreach": 1.6,
        "SGD fused": 1,
    },
    "tiny": {"foreach": 4},
}
# The least that each call can move, in float32 words per parameter.
CHUNK_WORDS, FINISH_WORDS = 8, 6
# torch's norms are summed in float32, and off by some 1e-5; a shift is rounded with its parameter.
TOLERANCE, SHIFT_TOLERANCE = 1e-4, 1e-3


def check_chunk(update: rivals.ChunkUpdate, chunk: Chunk) -> None:
    """Two chunks: the shift while it lasts, the parameters after it (bit for bit), and the sums."""
    displacement, added = chunk.expected
    seen: list[list[Tensor]] = []
    for _ in range(2):
        chunk.refresh()
        update.update(lambda: seen.append([p.detach().clone() for p in update.params]))
        moved = [s.double() - p.double() for s, p in zip(seen.pop(), chunk.params, strict=True)]
        require_close(update.name, "the shift", moved, displacement, SHIFT_TOLERANCE)
        require_close(update.name, "a restored parameter", update.params, _wide(chunk.params), 0)
    expected = torch._foreach_mul(added, 2)
    require_close(update.name, "the sum over two chunks", update.total(2), expected, TOLERANCE)


def check_finish(step: finishing.FinishingStep, finish: Finish) -> None:
    """Two steps, the first of which starts the momentum."""
    displacement, velocity = finish.expected
    for _ in range(2):
        finish.refresh()
        step.step()
    moved = [p.double() - q.double() for p, q in zip(step.params, finish.params, strict=True)]
    require_close(step.name, "the update", moved, displacement, SHIFT_TOLERANCE)
    require_close(step.name, "the momentum", step.momentum(), velocity, TOLERANCE)


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def chunk_updates(chunk: Chunk, compiled: bool) -> list[rivals.ChunkUpdate]:
    """All contenders for the penalised chunk update, checked."""
    updates = []
    for kind in rivals.CHUNK_UPDATES:
        if compiled or kind is not rivals.Compiled:
            update = kind(chunk)
            check_chunk(update, chunk)
            updates.append(update)
    return updates


def chunk_table(size: str, plan: Plan, hot: bool = False) -> Timings:
    """Check and time the penalised chunk update; on a GPU with empty caches unless `hot`."""
    chunk = Chunk.of(shapes(size), device=plan.device)
    contenders = [
        Contender(u.name, lambda u=u: u.update(nothing), u.words * chunk.numel)
        for u in chunk_updates(chunk, plan.compiled)
    ]
    contenders += limits(CHUNK_WORDS * chunk.numel, plan.device)
    title = f"Penalised chunk update, {TITLES[size]}{_state(plan, hot)}"
    return measure(title, contenders, plan, prepare(chunk, hot))


def finish_table(size: str, plan: Plan, hot: bool = False) -> Timings:
    """Check and time the finishing step; on a GPU with empty caches unless `hot`."""
    finish = Finish.of(shapes(size), device=plan.device)
    contenders = []
    for kind in finishing.FINISHING_STEPS:
        if plan.compiled or kind is not finishing.Compiled:
            step = kind(finish)
            check_finish(step, finish)
            words = kind.words and kind.words * finish.numel
            contenders.append(Contender(kind.name, step.step, words))
    contenders += limits(FINISH_WORDS * finish.numel, plan.device)
    title = f"Finishing step, {TITLES[size]}{_state(plan, hot)}"
    return measure(title, contenders, plan, prepare(finish, hot))


def single_table(size: str, plan: Plan) -> Timings:
    """Check and time the kernels one by one."""
    chunk = Chunk.of(shapes(size), device=plan.device)
    sets = sets_for(chunk)
    contenders = single_ops(chunk, sets)
    contenders += copies(chunk) if plan.device.type != "cpu" else []
    contenders += limits(CHUNK_WORDS * chunk.numel, plan.device)
    where = "" if plan.device.type == "cpu" else f", {sets} set{'s' * (sets > 1)} of operands"
    return measure(f"Single kernels, {TITLES[size]}{where}", contenders, plan)


def prepare(work: Chunk | Finish, hot: bool) -> Callable[[], None]:
    """What is done before every call: renew the gradients and, on a GPU, empty its cache."""
    if hot or work.device.type == "cpu":
        return work.refresh
    evict = Eviction(work.device)
    return lambda: (work.refresh(), evict())


def _state(plan: Plan, hot: bool) -> str:
    return "" if plan.device.type == "cpu" else ", caches as they are" if hot else ", caches empty"


def nothing() -> None:
    """The second pass, which is not what is timed."""


def limit_of(timings: Timings) -> Timing | None:
    """The fastest that only moves memory; the largest, where there are copies of several sizes."""
    names = [row.name for row in timings.rows if is_limit(row.name)]
    most = max((timings[name].words for name in names), default=0)
    name = timings.fastest([name for name in names if timings[name].words == most])
    return name and timings[name]


def conclude(report: Report, size: str, chunk: Timings, finish: Timings) -> None:
    """Print the ratios that count, beside what they should be."""
    goals = GOALS.get(size, {})

    def ratio(timings: Timings, name: str, goal: str, claim: str | None = None) -> None:
        value = timings.ratio(name, timings.rows[0].name)
        report.goal(timings.title, claim or name, value, at_least=goals.get(goal))

    report.heading(f"{chunk.title}, time over fbopt's:")
    ratio(chunk, chunk.fastest([kind.name for kind in rivals.FOREACH]), "foreach")
    ratio(chunk, rivals.Published.name, "published")
    value = chunk.ratio(rivals.OursExact.name, rivals.Ours.name)
    report.goal(chunk.title, rivals.OursExact.name, value, at_most=goals.get("exact"))
    if limit := limit_of(chunk):
        claim = f"the memory limit for {CHUNK_WORDS} words ({limit.name})"
        ratio(chunk, limit.name, "limit", claim)
    report.heading(f"{finish.title}, time over fbopt's:")
    ratio(finish, finishing.TorchForeach.name, "SGD foreach")
    ratio(finish, finishing.TorchFused.name, "SGD fused")
    if limit := limit_of(finish):
        claim = f"the memory limit for {FINISH_WORDS} words ({limit.name})"
        ratio(finish, limit.name, "finish limit", claim)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    which = "sizes to time torch.compile for: a minute or two each, and more than ten for tiny"
    parser.add_argument("--compile", nargs="*", choices=SIZES, default=COMPILED, help=which)
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=())
    choice = parser.parse_args(argv)
    torch.set_num_threads(choice.threads)
    report = Report("ops", arguments(argv))
    for size in choice.sizes:
        compiled = size in choice.compile and not choice.quick
        rounds = choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS[size])
        plan = Plan(rounds, compiled=compiled)
        chunk = chunk_table(size, plan)
        report.table(chunk, limit_of(chunk))
        finish = finish_table(size, plan)
        report.table(finish, limit_of(finish))
        single = single_table(size, plan)
        limit = limit_of(single)
        report.table(single, limit, base=limit and limit.name)
        conclude(report, size, chunk, finish)
    return report.write(choice.out)


if __name__ == "__main__":
    main()
