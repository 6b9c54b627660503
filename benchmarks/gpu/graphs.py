"""Stage `graphs`: a penalised chunk of ResNet-18 with and without CUDA graphs, in a closure call
over several equal chunks. The gradients are compared before anything is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from benchmarks import networks
from benchmarks.calls import Bare, BareGraphed, Call, Ours, OursGraphed, Task, visible
from benchmarks.devices import PRECISIONS, Precision
from benchmarks.gpu import Settings
from benchmarks.harness import Contender, Plan, Timings, measure
from benchmarks.report import Report
from benchmarks.traces import trace

IMAGES, REHEARSED_IMAGES = (32, 128), (4,)
CHUNKS, ROUNDS, QUICK_ROUNDS = 16, 40, 3
REHEARSED_WIDTH, REHEARSED_CHUNKS = 4, 3
GOALS = {("bf16", 32): 1.5, ("bf16", 128): 1.3}
NAMES = {
    Ours: "fbopt",
    OursGraphed: "fbopt, graphs",
    Bare: "bare passes",
    BareGraphed: "bare passes, graphs",
}
# The first two visits of a shape run as they are; the third is captured.
VISITS = 3


def run(report: Report, settings: Settings) -> None:
    """A table for each precision and number of images."""
    images = REHEARSED_IMAGES if settings.rehearsal else IMAGES
    cases = [(name, n) for name in ("float32", "bf16") for n in images]
    for position, (name, n) in enumerate(cases):
        seconds = settings.left() / (len(cases) - position)
        with PRECISIONS[name].active():
            timings, same = table(PRECISIONS[name], n, settings, seconds)
        report.table(timings)
        report.fact(f"{timings.title}: graphed gradient", same)
        gain = timings.ratio(NAMES[Ours], NAMES[OursGraphed])
        goal = None if settings.rehearsal else GOALS.get((name, n))
        report.goal(timings.title, "chunk without graphs over graphed", gain, at_least=goal)
        settle(settings.where)
    for name, n in cases:  # in the end: launches are slower once a profiler has run
        with PRECISIONS[name].active():
            count_launches(report, PRECISIONS[name], n, settings)
        settle(settings.where)


def task(precision: Precision, n: int, settings: Settings) -> Task:
    """Equal chunks of n images, and a model in their precision's format."""
    device, small = settings.where, settings.rehearsal
    model = networks.model("resnet18", device, REHEARSED_WIDTH if small else None)
    model = model.to(memory_format=precision.memory_format)
    count = REHEARSED_CHUNKS if small else CHUNKS
    data = networks.chunks("resnet18", count * n, n, device)
    data = networks.formatted(data, precision.memory_format)
    return visible(Task(model, data, True, precision.autocast))


def title(precision: Precision, n: int) -> str:
    """What a table is about."""
    return f"One penalised chunk of {n} images, ResNet-18, {precision.name}"


def contenders(work: Task, n: int) -> list[Contender]:
    """All calls, each captured where it has graphs."""
    found = [
        Contender(name, kind(work), items=n, per=len(work.chunks)) for kind, name in NAMES.items()
    ]
    for contender in found * VISITS:
        contender.run()
    return found


def table(precision: Precision, n: int, settings: Settings, seconds: float) -> tuple[Timings, str]:
    """Compare the gradients, then time one chunk's part of a call; with it, how they compare."""
    work = task(precision, n, settings)
    same = compare(Ours(work), OursGraphed(work), precision)
    rounds = settings.rounds or (QUICK_ROUNDS if settings.quick else ROUNDS)
    plan = Plan(rounds, settings.where, seconds, whole=True)
    return measure(title(precision, n), contenders(work, n), plan), same


def count_launches(report: Report, precision: Precision, n: int, settings: Settings) -> None:
    """Report how many kernels and copies a chunk takes, where the profiler sees them."""
    if settings.where.type != "cuda":
        return
    work = task(precision, n, settings)
    for contender in contenders(work, n):
        if seen := trace(contender.run, lambda: None, settings.where):
            count = len(seen.launches) / len(work.chunks)
            about = f"{title(precision, n)}: kernels and copies for a chunk, {contender.name}"
            report.fact(about, f"{count:.1f}")


def compare(ours: Call, graphed: Call, precision: Precision) -> str:
    """Check that the gradient is the same with graphs, and say how nearly.

    What was captured here is of no use for timing: the algorithms are others.
    """
    with deterministic():
        ours()
        wanted = [p.grad.clone() for p in ours.params]
        for _ in range(VISITS):
            graphed()
        found = [p.grad for p in graphed.params]
        off = networks.require_near(NAMES[OursGraphed], found, wanted, precision.tolerance)
    return "the same bits" if off == 0 else f"off by {off:.1e} of its norm"


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let cuDNN take algorithms that give the same bits every time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def settle(device: torch.device) -> None:
    """Give back what the graphs of the last table held."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
