"""Closure calls against the forward and backward passes they make, and against plain torch.

    python -m benchmarks.step [--sizes resnet18 small-cnn] [--chunk N] [--chunks N] [--rounds N]
                              [--device cuda] [--precision fp32 tf32 bf16] [--quick]

Every contender is checked against fbopt.reference in float64 on a few samples, and in the precision
of the table on its own chunks, before it is timed. Ratios are time over that of the passes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cases, contenders
from benchmarks.cases import TITLES, Task, WrongResult, require_close
from benchmarks.report import QUICK_ROUNDS, Report, options
from benchmarks.timing import Contender, Plan, Table, measure
from fbopt import FullBatchClosure, GradientPenalty
from fbopt.train.precision import autocast_dtype, set_float32_precision

# Samples, and samples in a chunk: MNIST-1D has 4,000 to train on.
CNN_SETTINGS = [(4000, 128), (128, 128)]
CHECKED = (10, 4)
ROUNDS = {"resnet18": 15, "small-cnn": 60}
# Of the gradient's norm. Rounding differs with the order of sums, and the second pass magnifies it;
# without a second pass the gradient would be off by 0.67 for ResNet-18.
TOLERANCES = {"fp32": 2e-2, "tf32": 5e-2, "bf16": 0.35}
# Chunks of a shape run as usual twice; the third is captured in a CUDA graph.
VISITS = 3


class Call:
    """A closure call: visits all chunks and leaves the mean gradient in `p.grad`."""

    name: str

    def __init__(self, task: Task) -> None:
        self.task, self.params = task, task.params

    def __call__(self) -> object:
        raise NotImplementedError


class BarePasses(Call):
    """As many forward and backward passes, and nothing else."""

    name = "bare passes"

    def __call__(self) -> None:
        self.task.passes()


class FboptCall(Call):
    """FullBatchClosure."""

    name, cuda_graph = "fbopt", False

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        penalty = GradientPenalty(coefficient=task.coefficient, radius=task.radius)
        graphs = self.cuda_graph and task.device.type == "cuda"
        how = {"autocast": task.autocast, "cuda_graph": graphs}
        how |= {"penalty": penalty} if task.penalised else {}
        self.closure = FullBatchClosure(task.model, F.cross_entropy, task.chunks, **how)

    def __call__(self) -> Tensor:
        return self.closure()


class GraphedCall(FboptCall):
    """The same with the work on a chunk in a CUDA graph; on the CPU there is none."""

    name, cuda_graph = "fbopt, CUDA graphs", True


class TorchCall(Call):
    """A chunk update in plain torch between the passes; BatchNorm's statistics are left as is."""

    name = "plain torch"
    update_class: type[contenders.ChunkUpdate] = contenders.ForeachUpdate

    def __call__(self) -> Tensor:
        task, losses = self.task, []
        total = sum(len(y) for _, y in task.chunks)
        live = LiveChunk(task)
        update = self.update_class(live)
        for x, y in task.chunks:
            live.weight = len(y) / total
            loss, live.grads = task.gradient(x, y)
            losses.append(live.weight * loss)
            if task.penalised:
                update.update(partial(live.second_pass, x, y))
            else:
                torch._foreach_add_(update.sums, live.grads, alpha=live.weight)
        mean = update.total(len(task.chunks)) if task.penalised else update.sums
        for p, g in zip(self.params, mean, strict=True):
            p.grad = g
        return torch.stack(losses).sum()


class LiveChunk:
    """The chunk that is being visited, as a chunk update reads it."""

    def __init__(self, task: Task) -> None:
        self.task, self.radius, self.coefficient = task, task.radius, task.coefficient
        self.weight, self.grads, self.plus = 0.0, (), ()

    def parameters(self) -> list[nn.Parameter]:
        return self.task.params

    def second_pass(self, x: Tensor, y: Tensor) -> None:
        _, self.plus = self.task.gradient(x, y)


class UnsyncedCall(TorchCall):
    name, update_class = "plain torch without a host sync", contenders.ForeachUnsyncedUpdate


CALLS = {
    "cpu": (BarePasses, FboptCall, TorchCall),
    "cuda": (BarePasses, FboptCall, GraphedCall, TorchCall, UnsyncedCall),
}
PENALISED_ONLY = (UnsyncedCall,)  # without a penalty it is TorchCall


def checked(task: Task, kinds: Sequence[type[Call]], tolerance: float) -> list[Contender]:
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
        if not issubclass(kind, BarePasses):
            grads = [p.grad for p in call.params]
            require_close(kind.name, "p.grad", grads, mean, tolerance, norm=2)
        found.append(Contender(kind.name, call, samples=samples))
    hook.remove()
    return found


def check(size: str, penalised: bool, kinds: Sequence[type[Call]], device: torch.device) -> None:
    """Check contenders in float64 on a few samples."""
    chunks = [(x.double(), y) for x, y in cases.data(size, *CHECKED, device)]
    checked(Task(cases.model(size, device).double(), chunks, penalised), kinds, 1e-8)


def table(
    size: str, samples: int, chunk: int, penalised: bool, precision: str, plan: Plan
) -> Table:
    """Check, then time."""
    device = plan.device
    kinds = [k for k in CALLS[device.type] if penalised or k not in PENALISED_ONLY]
    check(size, penalised, kinds, device)
    set_float32_precision(precision, device)
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
    choice = parser.parse_args(argv)
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
