"""Stage `step`: one penalised full-batch step of ResNet-18, images resident on the device, against
the bare forward and backward passes and against the same step written in torch.

A step is the closure call over all chunks, the clip and the update; bare passes are as many passes
in the same precision and mode. The learning rate is so small that all rounds work at one theta.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import devices, networks
from benchmarks.calls import (
    Bare,
    BareGraphed,
    Call,
    Ours,
    OursGraphed,
    Plain,
    PlainUnsynced,
    Published,
    Task,
    expected,
    visible,
)
from benchmarks.devices import PRECISIONS, Precision, synchronize
from benchmarks.gpu import Settings
from benchmarks.gpu.graphs import REHEARSED_WIDTH, VISITS, settle
from benchmarks.harness import LEAST_ROUNDS, Contender, Plan, Timings, measure
from benchmarks.report import Report
from fbopt import FullBatchGD

IMAGES, CHUNK = 50_000, 128
REHEARSED_IMAGES, REHEARSED_CHUNK = 20, 8
MOST_ROUNDS = 15
# bfloat16 is what one would train in: half of the time is for it.
SHARES = {"bf16": 0.5, "tf32": 0.25, "float32": 0.25}
KINDS = {Ours: "fbopt", Bare: "bare passes", Plain: "foreach", PlainUnsynced: "foreach, no sync"}
KINDS |= {Published: "as published"}
GRAPHED = {OursGraphed: "fbopt", BareGraphed: "bare passes"}
RIVALS = (Plain, PlainUnsynced, Published)
PASSES_GOAL, SECONDS_GOAL, GOAL_DEVICE = 0.95, 2.5, "H100"
PROBED_CHUNKS, CHECKED_CHUNKS = 8, 2
CHECKED_SAMPLES, CHECKED_CHUNK = 10, 4
LR, MAX_NORM = 1e-6, 0.25
SGD = {"lr": LR, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Entry:
    """A contender in a mode: its name, its gradient, its whole step."""

    name: str
    call: Call
    step: Callable[[], object]


def run(report: Report, settings: Settings) -> None:
    """Check in float64, then a table for each precision, and the goals."""
    check(settings)
    best: dict[str, float] = {}
    names = [name for name in SHARES if name in settings.precisions]
    for position, name in enumerate(names):
        share = SHARES[name] / sum(SHARES[later] for later in names[position:])
        with PRECISIONS[name].active():
            timings = table(report, PRECISIONS[name], settings, share * settings.left())
        report.table(timings)
        best |= conclude(report, timings, goals=not settings.rehearsal)
        torch.compiler.reset()
        settle(settings.where)
    whole = {name: t for name, t in best.items() if f" {IMAGES:,} images" in name}
    if whole:
        fastest = min(whole, key=whole.get)
        bound = SECONDS_GOAL if GOAL_DEVICE in report.machine.get("device", "") else None
        report.goal("whole step, seconds", fastest, whole[fastest], at_most=bound)
    elif not settings.rehearsal:
        again = "python -m benchmarks.gpu_check step --precisions bf16 has all the time for it"
        report.fact(f"a step over {IMAGES:,} images", f"not timed, fewer fitted: {again}")


def check(settings: Settings) -> None:
    """All contenders' gradients against fbopt.reference in float64."""
    size = "small-cnn" if settings.rehearsal else "resnet18"
    kinds = [kind for kind in KINDS if kind is not Bare]
    networks.check(size, CHECKED_SAMPLES, CHECKED_CHUNK, True, settings.where, kinds)


def entries(task: Task, mode: str, kinds: dict[type[Call], str]) -> list[Entry]:
    """The contenders of a mode."""
    calls = {name + mode: kind(task) for kind, name in kinds.items()}
    return [Entry(name, call, whole(call)) for name, call in calls.items()]


def whole(call: Call) -> Callable[[], object]:
    """The call and what ends a step: clip and update, but for bare passes."""
    if isinstance(call, Bare):
        return call
    if isinstance(call, Ours):
        optimizer = FullBatchGD(call.params, **SGD, max_norm=MAX_NORM)
        return lambda: optimizer.step(call.closure)
    sgd = torch.optim.SGD(call.params, **SGD, foreach=True)

    def step() -> None:
        call()
        torch.nn.utils.clip_grad_norm_(call.params, MAX_NORM, foreach=True)
        sgd.step()

    return step


def contenders(task: Task, compiled: bool) -> list[Entry]:
    """All contenders in all modes."""
    found = entries(task, "", KINDS) + entries(task, ", graphs", GRAPHED)
    if compiled:
        # A program for each size of a chunk; one for all sizes would be slower.
        task = replace(task, model=torch.compile(task.model, dynamic=False))
        found += entries(task, ", compiled", KINDS)
        found += entries(task, ", compiled, graphs", GRAPHED)
    return found


def table(report: Report, precision: Precision, settings: Settings, seconds: float) -> Timings:
    """Check, warm up, estimate, then time as many images and rounds as fit."""
    deadline = time.monotonic() + seconds
    device, small = settings.where, settings.rehearsal
    images = settings.images or (REHEARSED_IMAGES if small else IMAGES)
    chunk = min(images, REHEARSED_CHUNK if small else CHUNK)
    if not precision.autocast:
        images -= images % chunk  # time is short: no second program for a ragged chunk
    model = networks.model("resnet18", device, REHEARSED_WIDTH if small else None)
    model = model.to(memory_format=precision.memory_format)
    everything = networks.chunks("resnet18", images, chunk, device)
    everything = networks.formatted(everything, precision.memory_format)
    full = [c for c in everything if len(c[1]) == chunk]
    data = full[:CHECKED_CHUNKS]
    compiled = not settings.quick and devices.compiles(device)
    task = visible(Task(model, data, True, precision.autocast))
    found = contenders(task, compiled)
    report.fact(f"{precision.name}: gradients off by", warm_up(found, precision))
    if len(full) < len(everything):
        data[:] = everything[-1:]
        for entry in found * VISITS:
            entry.step()
    data[:] = full[:PROBED_CHUNKS]
    each = sum(probe(entry, device) for entry in found) / (len(data) * chunk)
    left = deadline - time.monotonic()
    images, rounds = schedule(each, images, chunk, left, settings.rounds, settings.quick)
    data[:] = everything[: -(-images // chunk)]
    plan = Plan(rounds, device, max(left, 0.0), whole=True)
    title = f"One penalised step of ResNet-18, {images:,} images in chunks of {chunk}"
    rows = [Contender(entry.name, entry.step, items=images) for entry in found]
    return measure(f"{title}, {precision.name}", rows, plan)


def warm_up(found: Sequence[Entry], precision: Precision) -> str:
    """Compare every gradient with fbopt.reference on the same passes; tells the largest error.

    A compiled model rounds elsewhere, which in half precision shows: it has a reference of its own.
    """
    tasks = {id(entry.call.task): entry.call.task for entry in found}
    references, errors = {key: expected(task) for key, task in tasks.items()}, []
    for entry in found:
        wanted = references[id(entry.call.task)]
        for _ in range(VISITS):
            entry.call()
        if not isinstance(entry.call, Bare):
            grads = [p.grad for p in entry.call.params]
            errors.append(networks.require_near(entry.name, grads, wanted, precision.tolerance))
    return f"at most {max(errors):.1e} of their norm (bound {precision.tolerance:g})"


def probe(entry: Entry, device: torch.device) -> float:
    """Seconds of a step over a few chunks, after one that is not timed."""
    entry.step()
    synchronize(device)
    start = time.perf_counter()
    entry.step()
    synchronize(device)
    return time.perf_counter() - start


def schedule(
    each: float, images: int, chunk: int, seconds: float, rounds: int | None, quick: bool
) -> tuple[int, int]:
    """How many images and rounds fit, if a round takes `each` second for an image.

    Images are left out, whole chunks of them, where not even the least number of rounds would fit.
    """
    if rounds is not None:
        return images, rounds
    fit = int(seconds / (each * images)) if seconds > 0 else 0
    if fit < LEAST_ROUNDS and not quick:
        fewer = int(max(seconds, 0) / (LEAST_ROUNDS * each)) // chunk * chunk
        return max(chunk, min(images, fewer)), LEAST_ROUNDS
    return images, LEAST_ROUNDS if quick else min(fit, MOST_ROUNDS)


def conclude(report: Report, timings: Timings, goals: bool) -> dict[str, float]:
    """The share of the bare passes' images/s in every mode, and the rivals' times over ours."""
    title, best = timings.title, {}
    timed = [row.name for row in timings.rows]
    report.heading(f"{title}: fbopt's images/s over those of the bare passes, rivals' time over it")
    for mode in ("", ", graphs", ", compiled", ", compiled, graphs"):
        ours = f"{KINDS[Ours]}{mode}"
        if ours not in timed:
            continue
        best[f"{title}: {ours}"] = timings[ours].median
        share = timings.ratio(f"{KINDS[Bare]}{mode}", ours)
        report.goal(title, ours, share, at_least=PASSES_GOAL if goals else None)
        for kind in RIVALS:
            if f"{KINDS[kind]}{mode}" in timed:
                name = f"{KINDS[kind]}{mode}"
                report.goal(title, f"{name}: time over fbopt's", timings.ratio(name, ours))
    return best
