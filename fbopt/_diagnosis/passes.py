"""Checks by two passes over each of the first chunks: the same chunks, the same bits, finite
values, parameters that are used.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.report import Report
from fbopt._diagnosis.setup import some
from fbopt._engine.inputs import tensors
from fbopt._engine.repeatability import DRAWN_ELSEWHERE, other_chunks
from fbopt._sharding import local

Gradient = tuple[Tensor, list[Tensor | None]]


def check_same_chunks(probe: Probe, chunks: Sequence[Any], report: Report) -> None:
    """Visit the first chunks again, without rewinding random generators, and compare bits."""
    report.note("chunks")
    first = [fingerprint(c) for c in chunks]
    again = [fingerprint(c) for c in probe.few_chunks()] if chunks else []
    _check_shares(probe, first, report)
    if first != again:
        _report_other_chunks(probe, first, again, report)


def _report_other_chunks(probe: Probe, first: list[int], again: list[int], report: Report) -> None:
    closure, (found, cause, cure) = probe.closure, other_chunks(first, again)
    sampler = getattr(closure.chunks, "sampler", None)
    if isinstance(sampler, torch.utils.data.RandomSampler):
        found, cause = "had other samples in the first ones", "a DataLoader with shuffle=True"
        cure = "pass shuffle=False"
    differs = sum(a != b for a, b in zip(first, again, strict=False)) or abs(
        len(first) - len(again)
    )
    reasons = [
        name
        for name, is_on in {
            "the penalty is on each chunk's gradient": closure.penalty is not None,
            "each chunk is clipped": closure.chunk_max_norm is not None,
            "exact sums promise the same bits": closure.accumulation == "exact",
        }.items()
        if is_on
    ]
    if not reasons and any(isinstance(m, _BatchNorm) and m.training for m in probe.model.modules()):
        reasons = ["BatchNorm normalises by chunks"]
    where = f"; {reasons[0]}, so every call computes another function" if reasons else ""
    text = f"the second visit of chunks {found}: {differs} of {len(first)} differ, expected 0"
    fatal = reasons and not reasons[0].startswith("BatchNorm")
    (report.error if fatal else report.doubt)("chunks", text + where, cause, cure)


def _check_shares(probe: Probe, prints: list[int], report: Report) -> None:
    """Whether two processes of the group visit the same chunks; all of them call this."""
    everyone = probe.closure._reduction.collectives.all_gather_object(prints)
    for rank, theirs in enumerate(everyone):
        for other in range(rank):
            if theirs and theirs == everyone[other]:
                report.error(
                    "processes",
                    f"processes {other} and {rank} visit the same chunks",
                    "all chunks given to every process",
                    "give each its own, such as chunks[rank::world_size], or a DistributedSampler",
                )


def check_passes(probe: Probe, chunks: Sequence[Any], report: Report) -> list[Gradient]:
    """Take each chunk's gradient twice, with the same random draws; return the first ones."""
    report.note("same bits")
    found: list[Gradient] = []
    for index, chunk in enumerate(chunks):
        probe.draws.begin()
        try:
            first = probe.gradient(index, chunk)
            if any(p.grad is not None for p in probe.params):
                _report_backward(probe, report)
            probe.draws.rewind()
            again = probe.gradient(index, chunk)
        except Exception as error:
            _report_failure(probe, index, chunk, error, report)
            return []
        if _check_finite(probe, index, first, report):
            _compare(probe, index, first, again, report)
        found.append(first)
    _check_used(probe, found, report)
    return [] if report.has_errors_about("finite values") else found


def _report_failure(probe: Probe, index: int, chunk: Any, error: Exception, report: Report) -> None:
    text = " ".join(str(error).split())
    here, there = probe.forward.device, {t.device for t in tensors(chunk)}
    moved = f"chunk {index} is on {', '.join(map(str, there))}, the model on {here}"
    if there and here not in there:
        cure = "move each chunk where it is made, or in evaluate: x.to(device)"
        report.error("chunks", f"{moved}: {text[:200]}", "chunks that were not moved", cure)
        return
    report.error(
        "chunks",
        f"the gradient of chunk {index} fails: {type(error).__name__}: {text[:400]}",
        "chunks and model, or loss, that do not fit each other",
        "run the model and the loss on this chunk alone to see the traceback",
    )


def _report_backward(probe: Probe, report: Report) -> None:
    for p in probe.params:
        p.grad = None
    report.error(
        "evaluate",
        "a pass has filled p.grad, expected None",
        "loss.backward() in evaluate or loss_fn",
        "return the loss: the closure differentiates it",
    )


def _check_finite(probe: Probe, index: int, found: Gradient, report: Report) -> bool:
    report.note("finite values")
    loss, grads = found
    if report.has_errors_about("finite values"):
        return False
    if not torch.isfinite(loss):
        report.error(
            "finite values",
            f"the loss of chunk {index} is {float(loss)}",
            "samples that are not finite, a mean over no sample (all targets ignored), or overflow",
            "look at this chunk's inputs and targets; leave chunks without targets out",
        )
        return False
    bad = [
        name
        for name, g in zip(probe.names, grads, strict=True)
        if g is not None and not torch.isfinite(local(g)).all()
    ]
    if bad:
        half = probe.closure.autocast is torch.float16
        report.error(
            "finite values",
            f"the loss of chunk {index} is {float(loss):.4g}, but the gradient of {len(bad)} "
            f"parameters is not finite: {some(bad)}",
            "overflow in float16" if half else "a square root, norm or logarithm at zero",
            "use autocast=torch.bfloat16" if half else "add an epsilon there",
        )
    return not bad


def _compare(probe: Probe, index: int, first: Gradient, again: Gradient, report: Report) -> None:
    losses = float(first[0]), float(again[0])
    difference, norm = distance(first[1], again[1]), distance(first[1])
    if losses[0] == losses[1] and difference == 0:
        return
    closure = probe.closure
    differs = norm > 0 and difference > 1e-4 * norm
    text = (
        f"two passes over chunk {index} with the same random draws give the losses {losses[0]!r} "
        f"and {losses[1]!r}; their gradients differ by {difference / max(norm, 1e-300):.1e} of "
        "their norm, expected 0"
    )
    if differs:
        by_difference = closure.penalty is not None and closure.penalty.method != "exact"
        wrong = by_difference or closure.accumulation == "exact"
        (report.error if wrong else report.doubt)(
            "same bits",
            text,
            f"{DRAWN_ELSEWHERE}, by NumPy, Python or a generator of its own, or a model that "
            "changes from pass to pass",
            "draw from torch's default generator: its draws are repeated",
        )
    elif closure.accumulation == "exact":
        report.doubt(
            "same bits",
            text,
            "operations that add in no fixed order",
            "torch.use_deterministic_algorithms(True)",
        )


def _check_used(probe: Probe, found: list[Gradient], report: Report) -> None:
    report.note("parameters")
    unused = [
        name for i, name in enumerate(probe.names) if all(grads[i] is None for _, grads in found)
    ]
    if found and len(unused) == len(probe.params):
        report.error(
            "parameters",
            f"the loss depends on none of the closure's {len(unused)} parameters",
            "evaluate or loss_fn uses another model, such as a copy",
            "use the model that evaluate(model, chunk) is given, or pass params=",
        )
    elif unused:
        report.doubt(
            "parameters",
            f"{len(unused)} of {len(probe.params)} parameters have no gradient in the first "
            f"{len(found)} chunks: {some(unused)}",
            "a layer that the loss does not reach, or a detach() in between",
            "freeze it with requires_grad_(False) if that is meant",
        )


def fingerprint(chunk: Any) -> int:
    """A checksum of the bits of a chunk's dense tensors, in order."""
    found = 0
    for t in (t for t in tensors(chunk) if t.layout == torch.strided):
        flat = t.detach().cpu().contiguous().reshape(-1)
        found = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), found)
    return found


def distance(a: Sequence[Tensor | None], b: Sequence[Tensor | None] | None = None) -> float:
    """||a - b||, or ||a||, in float64, of this process's shards; None counts as zero."""
    total = 0.0
    for i, x in enumerate(a):
        y = None if b is None else b[i]
        if x is None and y is None:
            continue
        wide = torch.zeros_like(local(y)) if x is None else local(x.detach())
        wide = wide.double() if y is None else wide.double() - local(y.detach()).double()
        total += float(wide.square().sum())
    return total**0.5
