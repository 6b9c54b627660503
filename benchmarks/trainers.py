"""What trainers do by themselves with ragged batches and tokens, beside fbopt's integrations.

    python -m benchmarks.trainers [--trainers lightning accelerate transformers] [--quick]

A trainer makes three steps of SGD, each on several batches. The error is the largest difference of
a parameter from the same steps in float64, each on one batch that holds all sequences. With
bfloat16 parameters it is that of the only step's gradient, relative to its norm; the sequences are
equally long there, so that no weight is wrong and only the sums differ.

The trainers are in trainer_NAME.py, each with three WAYS to train: by itself, weighted by fbopt,
and with one full-batch step of fbopt's an epoch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch

from benchmarks import tiny_language as tiny
from benchmarks.cases import WrongResult
from benchmarks.report import Report, aligned, options

TRAINERS = ("lightning", "accelerate", "transformers")
# The most that a way with fbopt may be off: a few roundings.
LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}
BFLOAT16_SEQUENCES, QUICK_SEQUENCES = 256, 64


@dataclass(frozen=True)
class Case:
    """`sizes`: the sequences in each batch of an epoch; `window`: batches of a step, or all."""

    name: str
    model: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    lengths: tuple[int, int] = (3, 20)
    window: int | None = None
    epochs: int = 3


def cases(quick: bool = False) -> list[Case]:
    """Return the columns of the table."""
    same, ragged = (12, 12), (4, 9, 2, 11)
    single = (1,) * (QUICK_SEQUENCES if quick else BFLOAT16_SEQUENCES)
    names = dict(zip(tiny.MODELS, ("GPT-2", "Llama"), strict=True))
    return [
        Case("ragged batch", "bigram", torch.float64, (8, 8, 2), same),
        Case("tokens", "bigram", torch.float64, (6, 6, 6)),
        Case("leftover window", "bigram", torch.float64, (8,) * 7 + (2,), same, 3, 1),
        *(Case(names[m], m, torch.float32, ragged) for m in tiny.MODELS),
        *(
            Case(f"{names[m]}, bfloat16", m, torch.bfloat16, single, same, None, 1)
            for m in tiny.MODELS
        ),
    ]


class Task:
    """What a trainer is given: `model`, `optimizer`, the `batches` of an epoch, how many a step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = tiny.language_model(case.model).to(case.dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=tiny.LR)
        self.optimizer.register_step_post_hook(self._keep_gradient)
        samples = tiny.sequences(sum(case.sizes), *case.lengths)
        if case.dtype == torch.bfloat16:
            for sample in samples:  # no model predicts it, but some trainers count it
                sample["labels"] = sample["labels"].clone()
                sample["labels"][0] = tiny.IGNORED
        rest = iter(samples)
        parts = [[next(rest) for _ in range(size)] for size in case.sizes]
        self.batches = [tiny.collate(part) for part in parts]
        self.window = case.window or len(parts)
        windows = [parts[i : i + self.window] for i in range(0, len(parts), self.window)]
        self._windows = [list(chain(*window)) for window in windows] * case.epochs

    def error(self) -> float:
        """Return how far the trained model is from one batch in float64."""
        start = tiny.language_model(self.case.model).to(self.case.dtype)
        expected = tiny.one_batch(start, self._windows)
        if self.case.dtype != torch.bfloat16:
            return tiny.distance(self.model, expected)
        gradient = torch.cat([p.grad.flatten() for p in expected.parameters()])
        return float((self._gradient - gradient).norm() / gradient.norm())

    def _keep_gradient(self, *ignored: object) -> None:
        self._gradient = torch.cat([p.grad.double().flatten() for p in self.model.parameters()])


def errors(trainer: str, case: Case) -> dict[str, float]:
    """Train in each way of a trainer; raise WrongResult where one with fbopt is off."""
    ways: dict[str, Callable[[Task], None]]
    ways = importlib.import_module(f"benchmarks.trainer_{trainer}").WAYS
    found = {}
    for way, train in list(ways.items())[: 3 if case.window is None else 2]:
        task = Task(case)
        train(task)
        found[way] = task.error()
    own, *ours = found.values()
    limit = LIMITS[case.dtype]
    if max(ours) > limit or (case.dtype == torch.bfloat16 and max(ours) > own):
        raise WrongResult(f"{case.name}: {found}, and with fbopt the limit is {limit:.1g}")
    return found


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    choice = parser.parse_args(argv)
    report = Report("trainers", choice, argv)
    report.machine |= {name: version(name) for name in TRAINERS}
    columns, rows = cases(choice.quick), {}
    for trainer in choice.trainers:
        for case in columns:
            for way, error in errors(trainer, case).items():
                rows.setdefault(way, {})[case.name] = error
    lines = [["", *(case.name for case in columns)]]
    for way, row in rows.items():
        lines.append([way, *(f"{row[c.name]:.2g}" if c.name in row else "" for c in columns)])
    print(", ".join(f"{name} {report.machine[name]}" for name in TRAINERS))
    print(f"\n{aligned(lines)}")
    report.facts["errors"] = rows
    return report.write(choice.out)


if __name__ == "__main__":
    main()
