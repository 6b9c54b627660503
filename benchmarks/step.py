"""Closure calls against the forward and backward passes they make, and against plain torch.

    python -m benchmarks.step [--sizes resnet18 small-cnn] [--chunk N] [--chunks N] [--rounds N]
                              [--device cuda] [--precision fp32 tf32 bf16] [--quick]
    python -m benchmarks.step --peers [--workloads cnn mlp] [--data-dir DIR] [--growth] [--quick]

The second form compares the penalised step with JAX and others, see benchmarks/peers.

Every contender is checked against fbopt.reference in float64 on a few samples, and in the precision
of the table on its own chunks, before it is timed. Ratios are time over that of the passes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.calls import BarePasses, FboptCall, GraphedCall, TorchCall
from benchmarks.cases import TITLES, WrongResult, require_close
from benchmarks.peers import program as peers
from benchmarks.report import QUICK_ROUNDS, Report, options
from benchmarks.task import Task
from benchmarks.timing import Contender, Plan, Table, measure
from fbopt.train.precision import autocast_dtype, set_arithmetic

# Samples, and samples in a chunk: MNIST-1D has 4,000 to train on.
CNN_SETTINGS = [(4000, 128), (128, 128)]
CHECKED = (10, 4)
ROUNDS = {"resnet18": 15, "small-cnn": 60}
# Of the gradient's norm. Rounding differs with the order of sums, and the second pass magnifies it;
# without a second pass the gradient would be off by 0.67 for ResNet-18.
TOLERANCES = {"fp32": 2e-2, "tf32": 5e-2, "bf16": 0.35}
# Chunks of a shape run as usual twice; the third is captured in a CUDA graph.
VISITS = 3


CALLS = {
    "cpu": (BarePasses, FboptCall, TorchCall),
    "cuda": (BarePasses, FboptCall, GraphedCall, TorchCall),
}
Kinds = Sequence[type[BarePasses]]


def checked(task: Task, kinds: Kinds, tolerance: float) -> list[Contender]:
    """The contenders for a task, compared with the reference, their forward passes counted.

    They have been called often enough to have captured their CUDA graphs.
    """
    found, passes = [], []
    hook = task.model.register_forward_hook(lambda *_: passes.append(1))
    before = [p.detach().clone() for p in task.params]
    mean, count, samples = task.expected, len(task.chunks), sum(len(y) for _, y in task.chunks)
    for kind in kinds:
        call = kind(task)
        graphed = issubclass(kind, GraphedCall)
        passes.clear()
        call()
        if len(passes) != count * (1 + task.penalised) and not graphed:  # a replay runs no hook
            raise WrongResult(f"{kind.name}: {len(passes)} forward passes over {count} chunks")
        for _ in range(VISITS * graphed):
            call()
        require_close(kind.name, "a parameter afterwards", call.params, before, 0)
        if kind is not BarePasses:
            grads = [p.grad for p in call.params]
            require_close(kind.name, "p.grad", grads, mean, tolerance, norm=2)
        found.append(Contender(kind.name, call, samples=samples))
    hook.remove()
    return found


def check(
    size: str, penalised: bool, kinds: Sequence[type[BarePasses]], device: torch.device
) -> None:
    """Check contenders in float64 on a few samples."""
    chunks = [(x.double(), y) for x, y in cases.data(size, *CHECKED, device)]
    checked(Task(cases.model(size, device).double(), chunks, penalised), kinds, 1e-8)


def table(
    size: str, samples: int, chunk: int, penalised: bool, precision: str, plan: Plan
) -> Table:
    """Check, then time."""
    device = plan.device
    kinds = CALLS[device.type]
    check(size, penalised, kinds, device)
    set_arithmetic(precision, device)
    network, chunks = cases.model(size, device), cases.data(size, samples, chunk, device)
    what = f"{'with' if penalised else 'without'} penalty, {TITLES[size]}"
    count = "one chunk" if len(chunks) == 1 else f"{len(chunks)} chunks"
    title = f"Closure call {what}, {samples} samples in {count} of {chunk}"
    title += "" if precision == "fp32" else f", {precision}"
    if precision == "bf16" and size == "resnet18":
        title, last = f"{title}, channels_last", {"memory_format": torch.channels_last}
        network, chunks = network.to(**last), [(x.contiguous(**last), y) for x, y in chunks]
    task = Task(network, chunks, penalised, autocast_dtype(precision)).with_visible_penalty()
    return measure(title, checked(task, kinds, TOLERANCES[precision]), plan)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=tuple(ROUNDS), default=list(ROUNDS))
    parser.add_argument("--chunk", type=int, default=32, help="images per chunk for ResNet-18")
    parser.add_argument("--chunks", type=int, default=1, help="chunks per call for ResNet-18")
    parser.add_argument("--precision", nargs="+", choices=tuple(TOLERANCES), default=["fp32"])
    peers.add_options(parser)
    choice = parser.parse_args(argv)
    if choice.peers:
        return peers.main(choice, argv)
    report = Report("step", choice, argv)
    for size in choice.sizes:
        rounds = choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS[size])
        plan = Plan(rounds, choice.device, choice.seconds)
        settings = [(choice.chunks * choice.chunk, choice.chunk)]
        if size == "small-cnn":
            settings = CNN_SETTINGS[choice.quick :]
        for samples, chunk in settings:
            for precision in choice.precision:
                for penalised in (False, True):
                    report.table(table(size, samples, chunk, penalised, precision, plan))
    return report.write(choice.out)


if __name__ == "__main__":
    main()
