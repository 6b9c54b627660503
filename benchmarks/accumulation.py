"""Gradients summed over chunks: accumulator.chunk() beside plain .backward() and autograd.grad.

    python -m benchmarks.accumulation [--models resnet18 transformer] [--chunks N] [--rounds N]
                                      [--cpu-time] [--quick]

A call visits all chunks and leaves the weighted mean gradient in `p.grad`; that of every contender
is compared with a float64 sum first. The peak is of bytes that torch has allocated since the call
began and not freed, from the profiler's record of every allocation: sums, gradients and
activations; not parameters and data, which are there before. Last, bfloat16 parameters: how far the
accumulated gradient is from the float64 sum of the same chunks' gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import cases
from benchmarks.cases import CLASSES, require_close
from benchmarks.report import QUICK_ROUNDS, Report, aligned, options
from benchmarks.timing import Contender, Plan, measure
from fbopt import GradientAccumulator

ROUNDS, CHUNKS, BF16_CHUNKS = 21, 4, 64
TOLERANCE = 1e-5  # of the gradient's norm
VOCABULARY, LENGTH = 256, 64


class Transformer(nn.Module):
    """A causal language model over bytes: tokens (n, length) to logits (n, vocabulary, length)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.token(tokens) + self.place, mask=self.mask, is_causal=True)
        return (x @ self.token.weight.T).transpose(1, 2)  # tied weights


@dataclass(frozen=True)
class Work:
    """A model and its chunks of (input, target, weight)."""

    model: nn.Module
    chunks: list[tuple[Tensor, Tensor, int]]

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def total(self) -> int:
        return sum(weight for *_, weight in self.chunks)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)


def resnet18(chunks: int, quick: bool) -> Work:
    """ResNet-18 on 32×32 images, the last chunk smaller."""
    sizes = [2 if quick else 16] * (chunks - 1) + [1 if quick else 9]
    data = [(torch.randn(n, 3, 32, 32), torch.randint(CLASSES, (n,)), n) for n in sizes]
    return Work(cases.model("resnet18"), data)


def transformer(chunks: int, quick: bool, dtype: torch.dtype = torch.float32) -> Work:
    """25 million parameters; the last chunk smaller."""
    sizes = [1 if quick else 4] * (chunks - 1) + [1 if quick else 2]
    tokens = [torch.randint(VOCABULARY, (n, LENGTH + 1)) for n in sizes]
    data = [(t[:, :-1], t[:, 1:], len(t) * LENGTH) for t in tokens]
    torch.manual_seed(0)
    small = quick or dtype == torch.bfloat16
    return Work(Transformer(64 if small else 512, 2 if small else 8).to(dtype), data)


MODELS = {"resnet18": resnet18, "transformer": transformer}


def plain(work: Work) -> Callable[[], None]:
    """The usual loop: `p.grad` is the sum."""

    def call() -> None:
        work.model.zero_grad()
        for x, y, weight in work.chunks:
            (work.loss(x, y) * (weight / work.total)).backward()

    return call


def hooks(work: Work) -> Callable[[], None]:
    """GradientAccumulator, as autograd makes the gradients."""
    accumulator = GradientAccumulator(work.params)

    def call() -> None:
        for x, y, weight in work.chunks:
            with accumulator.chunk(weight):
                work.loss(x, y).backward()
        accumulator.to_grad()

    return call


def functional(work: Work) -> Callable[[], None]:
    """All gradients of a chunk from torch.autograd.grad, then added."""
    params = work.params
    sums = [torch.zeros_like(p) for p in params]

    def call() -> None:
        torch._foreach_zero_(sums)
        for x, y, weight in work.chunks:
            grads = torch.autograd.grad(work.loss(x, y), params)
            torch._foreach_add_(sums, grads, alpha=weight / work.total)
        for p, total in zip(params, sums, strict=True):
            p.grad = total

    return call


CONTENDERS = {
    "plain .backward()": plain,
    "accumulator.chunk()": hooks,
    "torch.autograd.grad and add": functional,
}


def expected(work: Work) -> list[Tensor]:
    """The weighted mean of the chunks' gradients, added in float64."""
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in work.params]
    for x, y, weight in work.chunks:
        for total, g in zip(sums, torch.autograd.grad(work.loss(x, y), work.params), strict=True):
            total += g.double() * (weight / work.total)
    return sums


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that were allocated at once, above what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak


def step(kind: Callable[[Work], Callable[[], None]], work: Work) -> Callable[[], None]:
    """Build a contender and call it twice: sums and old gradients count, too."""
    call = kind(work)
    call()
    call()
    return call


def contenders(work: Work) -> list[Contender]:
    """All of them, checked, with their peaks."""
    found, wanted = [], expected(work)
    for name, kind in CONTENDERS.items():
        call = kind(work)
        work.model.zero_grad()
        call()
        call()
        require_close(name, "p.grad", [p.grad for p in work.params], wanted, TOLERANCE, norm=2)
        del call
        work.model.zero_grad()
        peak = peak_bytes(partial(step, kind, work))
        work.model.zero_grad()
        found.append(Contender(name, kind(work), peak_bytes=peak))
    return found


def own_gradients(contender: Contender, work: Work) -> Contender:
    """Each call begins without gradients, as after zero_grad()."""

    def run() -> None:
        work.model.zero_grad()
        contender.run()

    return Contender(contender.name, run, peak_bytes=contender.peak_bytes)


def bfloat16_errors(quick: bool) -> list[list[str]]:
    """The distance from the float64 sum, as a fraction of its norm."""
    torch.manual_seed(1)
    work = transformer(8 if quick else BF16_CHUNKS, True, torch.bfloat16)
    wanted, rows = expected(work), [["bfloat16 parameters", "error / norm"]]
    for name, kind in CONTENDERS.items():
        work.model.zero_grad()
        kind(work)()
        error = cases.distance([p.grad for p in work.params], wanted, 2)
        rows.append([name, f"{error:.1e}"])
    rounded = [w.bfloat16() for w in wanted]
    return [*rows, ["the sum, rounded once", f"{cases.distance(rounded, wanted, 2):.1e}"]]


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--chunks", type=int, default=CHUNKS, help="of a call")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine with other work")
    choice = parser.parse_args(argv)
    report = Report("accumulation", choice, argv)
    rounds = choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS)
    for name in choice.models:
        torch.manual_seed(1)
        work = MODELS[name](choice.chunks, choice.quick)
        rows = [own_gradients(contender, work) for contender in contenders(work)]
        count = sum(p.numel() for p in work.params)
        title = f"{name}, {count / 1e6:.1f} million parameters, {choice.chunks} chunks"
        title += ", CPU time" * choice.cpu_time
        now = time.process_time if choice.cpu_time else time.perf_counter
        plan = Plan(rounds, choice.device, choice.seconds, whole=True, now=now)
        report.table(measure(title, rows, plan))
    errors = bfloat16_errors(choice.quick)
    print(f"\n{aligned(errors)}")
    report.facts["bfloat16"] = dict(errors[1:])
    return report.write(choice.out)


if __name__ == "__main__":
    main()
