"""Whole closure calls against the forward and backward passes they make, and against plain torch.

    python -m benchmarks.step [--sizes resnet18 small-cnn] [--chunk N] [--rounds N] [--quick]

Every contender is checked against fbopt.reference in float64 before it is timed. `--chunk` is that
of ResNet-18; the fewer the images, the more the library's share weighs. The small CNN takes 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import networks
from benchmarks.calls import Bare, Ours, Plain, Task
from benchmarks.cases import TITLES
from benchmarks.harness import Contender, Plan, Timings, measure
from benchmarks.report import Report, arguments, options

CNN_CHUNK = 128
# MNIST-1D has 4,000 samples to train on.
CNN_SAMPLES = 4000
CHECKED_SAMPLES, CHECKED_CHUNK = 10, 4
ROUNDS = {"resnet18": 15, "small-cnn": 60}
QUICK_ROUNDS = 3
GOALS = {"resnet18": 1.01, "small-cnn": 1.06}


def settings(size: str, chunk: int, quick: bool) -> list[tuple[int, int]]:
    """The numbers of samples, and of samples in a chunk, that a size is timed with."""
    if size == "resnet18":
        return [(chunk, chunk)]
    return [(CNN_CHUNK, CNN_CHUNK)] if quick else [(CNN_SAMPLES, CNN_CHUNK), (CNN_CHUNK, CNN_CHUNK)]


def table(size: str, samples: int, chunk: int, penalised: bool, rounds: int) -> Timings:
    """Check on a few samples in float64, then time."""
    networks.check(size, CHECKED_SAMPLES, CHECKED_CHUNK, penalised)
    data = networks.chunks(size, samples, chunk)
    task = Task(networks.model(size), data, penalised)
    contenders = [Contender(kind.name, kind(task)) for kind in networks.CALLS]
    what = "with penalty" if penalised else "without penalty"
    count = "one chunk" if len(data) == 1 else f"{len(data)} chunks"
    title = f"Closure call {what}, {TITLES[size]}, {samples} samples in {count} of {chunk}"
    return measure(title, contenders, Plan(rounds))


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=tuple(ROUNDS), default=list(ROUNDS))
    parser.add_argument("--chunk", type=int, default=32, help="images per chunk for ResNet-18")
    choice = parser.parse_args(argv)
    torch.set_num_threads(choice.threads)
    report = Report("step", arguments(argv))
    for size in choice.sizes:
        rounds = choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS[size])
        for samples, chunk in settings(size, choice.chunk, choice.quick):
            for penalised in (False, True):
                timings = table(size, samples, chunk, penalised, rounds)
                report.table(timings)
                report.heading("Time over that of the passes alone:")
                for kind in (Ours, Plain):
                    bound = GOALS[size] if kind is Ours else None
                    ratio = timings.ratio(kind.name, Bare.name)
                    report.goal(timings.title, kind.name, ratio, at_most=bound)
    return report.write(choice.out)


if __name__ == "__main__":
    main()
