"""Checks of the set-up, without a pass: parameter sets, modes, processes, the last chunk's size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.report import Report
from fbopt._engine.inputs import tensors
from fbopt._engine.parameter_sets import check_covered
from fbopt._engine.repeatability import first_nonfinite

TINY = 3  # samples: too few to normalise by


def check_setup(probe: Probe, optimizer: torch.optim.Optimizer | None, report: Report) -> None:
    """Make all checks of this file."""
    name = first_nonfinite(probe.model, probe.params)
    if name is not None:
        report.error(
            "finite values",
            f"{name} of the model holds infinite or undefined values",
            "training diverged",
            "go back to an earlier checkpoint, or use a smaller learning rate",
        )
    optimizer = optimizer or probe.closure.optimizer
    if optimizer is None:
        report.skip("optimizer", "none was given")
    else:
        _check_optimizer(probe, optimizer, report)
    _check_modes(probe, report)
    _check_processes(probe, report)


def _check_optimizer(probe: Probe, optimizer: torch.optim.Optimizer, report: Report) -> None:
    report.note("optimizer")
    try:
        check_covered(optimizer, probe.params, probe.model)
    except ValueError as error:
        found, _, cure = str(error).rpartition("): ")
        cause = "parameters outside the closure's model, or a copy of it"
        report.error("optimizer", f"{found})", cause, cure)
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pairs = zip(probe.names, probe.params, strict=True)
    unmoved = [name for name, p in pairs if id(p) not in stepped]
    if unmoved:
        moved = len(probe.params) - len(unmoved)
        report.doubt(
            "optimizer",
            f"the closure differentiates {len(probe.params)} parameters, the optimizer steps on "
            f"{moved}; the others never move: {some(unmoved)}",
            "a layer that was not given to the optimizer",
            "add it to the optimizer, or freeze it with requires_grad_(False)",
        )
    _check_followed(probe, optimizer, report)


def _check_followed(probe: Probe, optimizer: torch.optim.Optimizer, report: Report) -> None:
    """Whether lambda follows the learning rate of the optimizer that steps."""
    closure = probe.closure
    penalty, followed = closure.penalty, closure.optimizer
    if penalty is None or penalty.coefficient is not None or followed in (None, optimizer):
        return
    rates = [float(o.param_groups[0]["lr"]) for o in (followed, optimizer)]
    report.doubt(
        "optimizer",
        "the penalty's coefficient follows the learning rate of another optimizer: "
        f"{rates[0]:g}, that of the one that steps is {rates[1]:g}",
        "an optimizer that was made or wrapped after the closure",
        "set closure.optimizer to the one that steps",
    )


def _check_modes(probe: Probe, report: Report) -> None:
    report.note("modes")
    random = [m for m in probe.model.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    norms = [m for m in probe.model.modules() if isinstance(m, _BatchNorm)]
    layers = [*norms, *random]
    if layers and not any(m.training for m in probe.model.modules()):
        report.doubt(
            "modes",
            f"all modules are in eval mode, {len(layers)} of BatchNorm or dropout among them: "
            "these normalise by old statistics and drop nothing",
            "model.eval() before an evaluation, and no model.train() after it",
            "call model.train() before the step",
        )


def _check_processes(probe: Probe, report: Report) -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world.isdigit() and int(world) > 1 and not started:
        report.error(
            "processes",
            f"WORLD_SIZE is {world}, but torch.distributed is not initialised: each process "
            "trains a model of its own",
            "a launch by torchrun without init_process_group()",
            "call torch.distributed.init_process_group() and pass the closure "
            "process_group=torch.distributed.group.WORLD",
        )


def check_last_chunk(probe: Probe, chunks: Sequence[Any], report: Report) -> None:
    """Whether BatchNorm normalises by a handful of samples in a ragged last chunk."""
    last, first = last_size(probe.closure.chunks), rows(chunks[0])
    training = [m for m in probe.model.modules() if isinstance(m, _BatchNorm) and m.training]
    if not training or last is None or first is None:
        return
    report.note("BatchNorm")
    if last <= TINY < first:
        report.doubt(
            "BatchNorm",
            f"the last chunk has {last} of the first one's {first} samples, by which "
            f"{len(training)} BatchNorm layers normalise it",
            "a number of samples that the chunk size does not divide",
            "choose a chunk size that leaves a larger rest, or drop_last=True",
        )


def last_size(chunks: Any) -> int | None:
    """How many samples the last chunk has, where that is known without visiting all."""
    if isinstance(chunks, Sequence):
        return rows(chunks[-1]) if chunks else None
    size = getattr(chunks, "batch_size", None)
    if not isinstance(chunks, torch.utils.data.DataLoader) or size is None:
        return None
    try:
        samples = len(chunks.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    rest = 0 if chunks.drop_last else samples % size
    return rest or min(size, samples)


def rows(chunk: Any) -> int | None:
    """The length that most tensors of a chunk share; None where no length is the most common."""
    lengths = [len(t) for t in tensors(chunk) if t.dim()]
    ranked = sorted(set(lengths), key=lengths.count, reverse=True)
    if not ranked or (len(ranked) > 1 and lengths.count(ranked[0]) == lengths.count(ranked[1])):
        return None
    return ranked[0]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
