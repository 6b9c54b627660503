"""Exact sums on the gradients of a real ResNet-18: what they cost, and how near they are.

    python -m benchmarks.exact [--data imagefolder:PATH] [--chunks N] [--chunk N] [--quick]

Over the chunks of one penalised pass the same gradients are added up in float32, in integers and in
float64. Times are of the chunk update (norm, shift, accumulation) and of the whole work on a chunk;
the units are those of a pass over CIFAR-10 in chunks of 128.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.cases import scalar
from benchmarks.report import Report, arguments, options
from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.perturb import Perturbation
from fbopt.train import models
from fbopt.train.data.load import load

CHUNKS, STRENGTH, LR, RADIUS = 391, 0.5, 0.8, 1e-2
MODES = ("float32", "exact")
COST, SHARE, NEARER = 1.3, 0.01, 0.99


class Mode:
    """The chunk update with one accumulation."""

    def __init__(self, params: list[nn.Parameter], accumulation: str) -> None:
        self.sums = GradientSums(params, accumulation)
        self.perturbation = Perturbation(self.sums.buckets)
        self.seconds: list[float] = []

    def begin(self) -> None:
        """Start a pass."""
        self.sums.reset()
        self.perturbation.begin()
        self.seconds = []

    def update(self, grads: Sequence[Tensor], plus: Sequence[Tensor], weight: int) -> None:
        """Everything but the passes."""
        begin = time.perf_counter()
        parts = self.sums.gather(grads)
        square = self.perturbation.fill(parts, RADIUS)
        plus = self.sums.gather(plus, "plus")
        self.sums.add_penalised(parts, plus, [], weight, scalar(LR * STRENGTH / 4), square, RADIUS)
        self.seconds.append(time.perf_counter() - begin)
        self.sums.total_weight += weight


def visit(model: nn.Module, data: list, modes: dict[str, Mode]) -> tuple[list[Tensor], list[float]]:
    """Add up all chunks in every mode; return the sums in float64, and each chunk's whole time."""
    params = list(model.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    whole = []
    for mode in modes.values():
        mode.begin()
    for index, (x, y) in enumerate(data):
        begin = time.perf_counter()
        grads = gradient(model, x, y)
        first = modes["float32"]
        square = first.perturbation.fill(first.sums.gather(grads), RADIUS)
        with first.perturbation.applied():
            plus = gradient(model, x, y)
        whole.append(time.perf_counter() - begin)
        for name in MODES[:: 1 if index % 2 else -1]:
            modes[name].update(grads, plus, len(y))
        factor = float(LR * STRENGTH / 4 * square.sqrt() / RADIUS)
        for total, g, up in zip(sums, grads, plus, strict=True):
            total.add_(torch.add(g, up - g, alpha=factor).double(), alpha=len(y))
    return sums, whole


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The gradient of a chunk's mean loss."""
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def nearness(modes: dict[str, Mode], sums: list[Tensor], total: float) -> tuple[float, float]:
    """The shares of elements for which exact sums are no farther from the float64 mean, nearer."""
    errors = []
    for name in MODES:
        modes[name].sums.finish()
        means = modes[name].sums.means()
        pairs = zip(means, sums, strict=True)
        errors.append(torch.cat([(m.double() - s / total).abs().flatten() for m, s in pairs]))
    rounded, exact = errors
    return float((exact <= rounded).double().mean()), float((exact < rounded).double().mean())


def run(report: Report, model: nn.Module, data: list) -> None:
    """One pass to find the units, and one that is measured."""
    modes = {name: Mode(list(model.parameters()), name) for name in MODES}
    exact = modes["exact"].sums
    visit(model, data[:3], modes)
    for _ in range(3):
        sums, whole = visit(model, data, modes)
        if exact.store.fit(exact.store.maxima(), max(CHUNKS, len(data))):
            break
    title = f"{len(data)} chunks of {len(data[0][1])}"
    pairs = zip(*(modes[name].seconds for name in ("exact", "float32")), strict=True)
    ratios = [a / b for a, b in pairs]
    for part, chosen in (
        ("first", ratios[: len(ratios) // 2]),
        ("second", ratios[len(ratios) // 2 :]),
    ):
        report.fact(f"{title}, exact over float32, {part} half", f"{statistics.median(chosen):.3f}")
    report.goal(title, "chunk update, exact over float32", statistics.median(ratios), at_most=COST)
    share = statistics.median(modes["exact"].seconds) / statistics.median(whole)
    report.goal(title, "exact chunk update, share of the work on a chunk", share, at_most=SHARE)
    carried = [int(c.ne(0).sum()) for part in exact.store._carries for c in part]
    report.fact(f"{title}, elements with a carry", f"{sum(carried):,}")
    no_farther, nearer = nearness(modes, sums, exact.total_weight)
    report.goal(title, "elements no farther from the float64 mean", no_farther, at_least=NEARER)
    report.fact(f"{title}, elements nearer to it", f"{nearer:.4f}")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", help="as for fbopt train; random images without it")
    parser.add_argument("--chunks", type=int, default=100, help="how many")
    parser.add_argument("--chunk", type=int, default=128, help="images in each")
    parser.add_argument("--width", type=int, default=64)
    choice = parser.parse_args(argv)
    torch.set_num_threads(choice.threads)
    report = Report("exact", arguments(argv))
    count = 4 if choice.quick else choice.chunks
    torch.manual_seed(0)
    if choice.data is None:
        data = networks.chunks("resnet18", count * choice.chunk, choice.chunk)
    else:
        split = load(choice.data).train
        order = torch.randperm(len(split))[: count * choice.chunk]
        data = [split.batch(part) for part in order.split(choice.chunk)]
    model = models.build("resnet18", tuple(data[0][0].shape[1:]), 10, choice.width)
    model = model.to(memory_format=torch.channels_last)
    run(report, model, [(x.to(memory_format=torch.channels_last), y) for x, y in data])
    return report.write(choice.out)


if __name__ == "__main__":
    main()
