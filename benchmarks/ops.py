"""The library's own part of a step: penalised chunk update, of K chunks at once too, finishing
step, single kernels.

    python -m benchmarks.ops [--sizes resnet18 small-cnn tiny] [--device cuda] [--quick]

Every contender is checked against fbopt.reference in float64 before it is timed. Ratios are time
over fbopt's: above 1 fbopt is faster. The gradients are rewritten before every call, as a backward
pass would.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.adaptive import ADAPTIVE_UPDATES
from benchmarks.bandwidth import limits
from benchmarks.cases import TITLES, Operands, require_close, shapes
from benchmarks.contenders import CHUNK_UPDATES, FINISHING_STEPS, ChunkUpdate, FinishingStep
from benchmarks.kernels import ETA, kernels
from benchmarks.report import QUICK_ROUNDS, Report, compiles, options
from benchmarks.stacks import STACKED_UPDATES, Stacks, check_stacked
from benchmarks.timing import Contender, Plan, Table, measure

ROUNDS = {"resnet18": 40, "small-cnn": 60, "tiny": 60, "large": 40}
SIZES = ("resnet18", "small-cnn", "tiny")
# How many chunks are worked on at once.
STACKS = {"resnet18": (4,), "small-cnn": (8, 32)}
COMPILED = ("resnet18", "small-cnn")
# torch's norms are summed in float32 and off by some 1e-5; what is added to a parameter is rounded
# with it.
TOLERANCE, PARAMETER_TOLERANCE = 1e-4, 1e-3


def check_update(update: ChunkUpdate, chunk: Operands) -> None:
    """Check two chunks: the perturbation, the restored parameters (bit for bit), and the sums."""
    perturbation, added = chunk.expected_update
    seen: list[list[Tensor]] = []
    for _ in range(2):
        chunk.refresh()
        update.update(lambda: seen.append([p.detach().clone() for p in update.params]))
        moved = [s.double() - p.double() for s, p in zip(seen.pop(), chunk.params, strict=True)]
        require_close(update.name, "the perturbation", moved, perturbation, PARAMETER_TOLERANCE)
        require_close(update.name, "a restored parameter", update.params, chunk.params, 0)
    expected = torch._foreach_mul(added, 2)
    require_close(update.name, "the sum over two chunks", update.total(2), expected, TOLERANCE)


def check_step(step: FinishingStep, finish: Operands) -> None:
    """Check two steps, the first of which starts the momentum."""
    displacement, velocity = finish.expected_step
    for _ in range(2):
        finish.refresh()
        step.step()
    moved = [p.double() - q.double() for p, q in zip(step.params, finish.params, strict=True)]
    require_close(step.name, "the update", moved, displacement, PARAMETER_TOLERANCE)
    require_close(step.name, "the momentum", step.momentum(), velocity, TOLERANCE)


# By title: contenders, their check, the least float32 words per parameter that each can read and
# write, and how the operands are made.
PARTS = {
    "Penalised chunk update": (CHUNK_UPDATES, check_update, 8, {}),
    "ASAM's chunk update": (ADAPTIVE_UPDATES, check_update, 9, {"eta": ETA}),
    "Finishing step": (FINISHING_STEPS, check_step, 6, {"penalised": False}),
}


def part_table(part: str, size: str, plan: Plan, compiled: bool) -> Table:
    """Check and time the penalised chunk update or the finishing step."""
    kinds, check, words, options = PARTS[part]
    case = Operands.of(shapes(size), plan.device, **options)
    contenders = []
    for kind in kinds:
        if compiled or not kind.compiled:
            contender = kind(case)
            check(contender, case)
            moved = kind.words and kind.words * case.numel
            contenders.append(Contender(kind.name, contender.step, moved))
    contenders += limits(words * case.numel, plan.device)
    return measure(f"{part}, {TITLES[size]}", contenders, plan, case.refresh)


def stack_table(size: str, chunks: int, plan: Plan, compiled: bool) -> Table:
    """Check and time the penalised update of several chunks at once."""
    case = Stacks(shapes(size), chunks, plan.device)
    contenders = []
    for kind in STACKED_UPDATES:
        if compiled or not kind.compiled:
            update = kind(case)
            check_stacked(update)
            contenders.append(Contender(kind.name, update.step, kind.words(chunks) * case.numel))
    contenders += limits((5 * chunks + 3) * case.numel, plan.device)
    title = f"Penalised update of {chunks} chunks at once, {TITLES[size]}"
    return measure(title, contenders, plan, case.refresh)


def kernel_table(size: str, plan: Plan) -> Table:
    """Check and time the kernels one by one."""
    chunk = Operands.of(shapes(size), plan.device)
    contenders = kernels(chunk) + limits(8 * chunk.numel, plan.device)
    # A GPU's cache then holds little of what the kernels read.
    prepare = chunk.refresh if plan.device.type == "cuda" else lambda: None
    return measure(f"Single kernels, {TITLES[size]}", contenders, plan, prepare)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=TITLES, default=SIZES)
    which = "sizes to time torch.compile for: a minute or two each, and more than ten for tiny"
    parser.add_argument("--compile", nargs="*", choices=TITLES, default=COMPILED, help=which)
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=())
    choice = parser.parse_args(argv)
    report = Report("ops", choice, argv)
    for size in choice.sizes:
        compiled = size in choice.compile and not choice.quick and compiles(choice.device)
        rounds = choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS[size])
        plan = Plan(rounds, choice.device, choice.seconds)
        for part in PARTS:
            report.table(part_table(part, size, plan, compiled))
        for chunks in STACKS.get(size, ()):
            report.table(stack_table(size, chunks, plan, compiled))
        table = kernel_table(size, plan)
        report.table(table, base=table.limit)
    return report.write(choice.out)


if __name__ == "__main__":
    main()
