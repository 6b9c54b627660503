"""A full-batch step of `fbopt train` that works on K chunks at once, in one thread.

    python -m benchmarks.at_once [--data mnist1d digits] [--chunk 128 32] [--counts 8 16 32 64]
                                 [--model cnn] [--compile] [--wall] [--quick]

A step with recipe fb-penalty is all of it: passes, exact sums, clipping and the update. Its
gradient is first compared with fbopt.reference. Timed is what the processor works, or with `--wall`
what the clock says; ratios are times over that of one chunk after the other. `--compile` times
compiled steps, too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.cases import require_close
from benchmarks.report import QUICK_ROUNDS, Report, compiles, options
from benchmarks.task import Task
from benchmarks.timing import CPU, Contender, Plan, Table, measure
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve
from fbopt.train.data.dataset import Data
from fbopt.train.data.load import load
from fbopt.train.malloc import keep_freed
from fbopt.train.precision import cross_entropy
from fbopt.train.trainer import Trainer

ROUNDS, COUNTS = 15, (8, 16, 32, 64)
LR, STRENGTH, RADIUS = 0.01, 400.0, 0.1  # lambda is 1: a wrong second pass shows
TOLERANCE = 5e-2  # of the gradient's norm: the second pass magnifies rounding


def contender(chosen: Options, data: Data) -> Contender:
    """The step of a run, once its gradient was found right."""
    run, count = Trainer(resolve(chosen), data, CPU), chosen.vectorize
    model, chunks = copy.deepcopy(run.model), list(run.chunks)
    penalty = {"radius": RADIUS, "coefficient": LR * STRENGTH / 4}
    task = Task(model, chunks, True, loss_fn=cross_entropy, **penalty)
    name = f"{count} at once" if count > 1 else "one by one"
    name += ", compiled" * chosen.compile
    run.closure()
    grads = [p.grad for p in run.model.parameters()]
    require_close(name, "p.grad", grads, task.expected, TOLERANCE, norm=2)
    run.take_step()
    return Contender(name, run.take_step, samples=len(data.train))


def options_of(data: str, size: int, model: str = "cnn") -> Options:
    """What all steps in chunks of a size have in common."""
    penalty = {"penalty": STRENGTH, "radius": RADIUS, "lr": LR, "warmup": 0}
    return Options(data, model=model, chunk_size=size, **penalty)


def table(common: Options, counts: Sequence[int], compiled: Sequence[bool], plan: Plan) -> Table:
    """The times of a step for every number of chunks at once that there are."""
    data = load(common.data).to(CPU)
    chunks = -(-len(data.train) // common.chunk_size)
    rows = [
        contender(replace(common, vectorize=count, compile=is_compiled), data)
        for is_compiled in compiled
        for count in (1, *(k for k in counts if k <= chunks))
    ]
    where = f"{common.data}, {chunks} chunks of {common.chunk_size}"
    title = f"A penalised step of {common.model} on {where}"
    return measure(title, rows, plan)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["mnist1d", "digits"])
    parser.add_argument("--chunk", nargs="+", type=int, default=[128, 32])
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="chunks at once")
    parser.add_argument("--model", default="cnn", help="as for `fbopt train`")
    parser.add_argument("--compile", action="store_true", help="time compiled steps, too")
    parser.add_argument("--wall", action="store_true", help="the clock's time, not the processor's")
    parser.set_defaults(threads=1)
    choice = parser.parse_args(argv)
    if choice.compile and not compiles(CPU):
        parser.error("--compile: torch.compile does not work here; leave it out")
    report = Report("at_once", choice, argv)
    keep_freed()  # as by `fbopt train`
    rounds = choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS)
    now = time.perf_counter if choice.wall else time.process_time
    plan = Plan(rounds, seconds=choice.seconds, whole=True, now=now)
    for data in choice.data:
        for size in choice.chunk:
            compiled = [False, True][: 1 + choice.compile]
            report.table(table(options_of(data, size, choice.model), choice.counts, compiled, plan))
    return report.write(choice.out)


if __name__ == "__main__":
    main()
