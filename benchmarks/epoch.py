"""Images/s of a whole full-batch step, against its bare passes and against the usual way.

    python -m benchmarks.epoch [--width N] [--images N] [--chunk N] [--precision P] [--compile]
                               [--penalty]

ResNet-18 on random 32×32 images, cropped and flipped anew. The usual way is the same step fed by a
DataLoader with worker processes, in float32, contiguous. Without augmentation every gradient is
first checked against fbopt.reference.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.calls import Task, expected
from benchmarks.devices import compiles
from benchmarks.harness import Contender, Plan, Timings, measure
from benchmarks.networks import distance, require_near
from benchmarks.report import Report, arguments, options
from benchmarks.whole_steps import (
    LR,
    STRENGTH,
    Job,
    Loaded,
    Passes,
    Step,
    Trained,
    require_model,
)
from fbopt.train.malloc import keep_freed
from fbopt.train.precision import autocast_dtype

ROUNDS, QUICK_ROUNDS = 7, 3
# Of the whole gradient's norm, from the reference in float64, or in the same bfloat16. One ReLU
# that a rounding puts on its other side shows in the third digit.
TOLERANCES = {"fp32": 2e-2, "tf32": 3e-2, "bf16": 3e-2}
CHECKED = {"images": 72, "chunk": 32, "augment": "none", "workers": 0}
FASTER, OF_ITS_PASSES = 2.0, 0.97


def contenders(job: Job, precision: str) -> list[Step]:
    """`fbopt train` as asked for, its passes, and the usual way; then the first two plain."""
    found: list[Step] = [Trained(job, precision, True), Passes(job, precision, True), Loaded(job)]
    if precision != "fp32" or job.compiled:
        plain = replace(job, compiled=False)
        found += [Trained(plain, "fp32", True), Passes(plain, "fp32", True)]
    return found


def check(job: Job, precision: str, report: Report) -> None:
    """Compare the gradients of every contender that leaves one with those of the reference."""
    job = replace(job, **CHECKED)
    for step in contenders(job, precision):
        if isinstance(step, Passes):
            continue
        before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
        exact, alike = reference(step, None), reference(step, autocast_dtype(step.precision))
        step()
        found = [p.grad for p in step.model.parameters()]
        require_near(step.name, found, alike, TOLERANCES[step.precision])
        require_model(step, before)
        report.fact(f"{step.name}: gradient off from float64's by", f"{distance(found, exact):.1e}")


def reference(step: Step, cast: torch.dtype | None) -> list[Tensor]:
    """The gradient by fbopt.reference: in float64, or with passes that are autocast."""
    job, dtype = step.job, torch.float64 if cast is None else torch.float32
    model = copy.deepcopy(step.model).to(dtype)
    x, y = job.data.to(job.device).train.batch(slice(None))
    layout = torch.channels_last if step.channels_last else torch.contiguous_format
    parts = [part.contiguous(memory_format=layout) for part in x.to(dtype).split(job.chunk)]
    chunks = list(zip(parts, y.split(job.chunk), strict=True))
    return expected(Task(model, chunks, job.penalised, cast, coefficient=LR * STRENGTH / 4))


def table(job: Job, precision: str, rounds: int) -> tuple[Timings, list[Step]]:
    """Time whole steps, interleaved."""
    steps = contenders(job, precision)
    for step in steps:  # worker processes, memory and algorithms are found once
        step()
    what = "with penalty" if job.penalised else "without penalty"
    title = (
        f"Full-batch step {what}, ResNet-18 of width {job.width}, {job.images} images in chunks of "
        f"{job.chunk}"
    )
    entries = [Contender(step.name, step, items=job.images) for step in steps]
    return measure(title, entries, Plan(rounds, job.device, whole=True)), steps


def quick_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 has instructions of its own."""
    return device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def tell(report: Report, timings: Timings, steps: list[Step]) -> None:
    """The ratios that a person would want."""
    report.table(timings)
    report.heading("Images/s of `fbopt train` over those of another, in the same round:")
    ours, passes, usual, *plain = (step.name for step in steps)
    faster = 1 / timings.ratio(ours, usual)
    goal = FASTER if steps[0].precision == "bf16" or steps[0].job.compiled else None
    report.goal(timings.title, f"{ours} over {usual}", faster, at_least=goal)
    for own, alone in [(ours, passes), *([tuple(plain)] if plain else [])]:
        share = 1 / timings.ratio(own, alone)
        report.goal(timings.title, f"{own} over {alone}", share, at_least=OF_ITS_PASSES)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16, help="of ResNet-18; 64 is the paper's")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    parser.add_argument(
        "--precision",
        choices=tuple(TOLERANCES),
        help="default: bf16, but fp32 on CPUs without AVX-512, where bfloat16 is slow",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile fbopt's model")
    parser.add_argument("--penalty", action="store_true", help="with the gradient penalty")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    choice = parser.parse_args(argv)
    torch.set_num_threads(choice.threads)
    job = Job(
        images=choice.images,
        chunk=choice.chunk,
        width=choice.width,
        penalised=choice.penalty,
        device=torch.device(choice.device),
        workers=choice.workers,
        compiled=choice.compile,
    )
    if job.compiled and not compiles(job.device):
        parser.error("--compile: torch.compile does not work here; leave it out")
    report = Report("epoch", arguments(argv), job.device)
    report.fact("all contenders keep freed memory, as `fbopt train` does", keep_freed())
    precision = choice.precision or ("bf16" if quick_in_bf16(job.device) else "fp32")
    check(job, precision, report)
    rounds = choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS)
    tell(report, *table(job, precision, rounds))
    return report.write(choice.out)


if __name__ == "__main__":
    main()
