"""What a loss that is no mean by the closure's weights comes from: sums, class weights, ignored
targets, broadcasting, weights that count something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.report import Report
from fbopt._diagnosis.setup import last_size, rows
from fbopt._diagnosis.wide import take
from fbopt._engine.other_means import refuse_other_means


class Split(NamedTuple):
    """A chunk's samples, their two parts, and the shares by the closure's weights."""

    whole: Any
    parts: tuple[Any, Any]
    sizes: tuple[int, int]
    weights: tuple[float, float]
    shares: tuple[float, float]


class Fit(NamedTuple):
    """How a whole follows from its parts."""

    losses: tuple[float, float, float]  # of the whole and the parts
    error: float  # relative, of the mean with the expected shares
    shares: tuple[float, float]  # that fit the gradient best
    residual: float  # relative, of that fit


def check_constant(probe: Probe, chunks: Sequence[Any], report: Report) -> None:
    """Whether all chunks weigh the same, though they have different numbers of samples."""
    report.note("weights")
    sizes = [rows(chunk) for chunk in chunks]
    weights = [probe.weight(i, chunk) for i, chunk in enumerate(chunks)]
    last = last_size(probe.closure.chunks)
    known = [n for n in [*sizes, last] if n is not None]
    if len(set(known)) < 2 or None in sizes or len(set(weights)) > 1:
        return
    length = sizes[0]
    try:
        half = probe.weight(0, take(chunks[0], 0, length // 2, length))
    except Exception:
        return
    if half == weights[0]:
        small = min(known)
        report.error(
            "weights",
            f"every chunk has the weight {half:g}, but chunks have {small} to {max(known)} "
            f"samples: one of the smaller counts {max(known) / small:.3g} times as much, expected "
            "1",
            "weight= returns a constant"
            if probe.closure.weight
            else "the first tensor of a chunk is not the batch",
            "pass weight=lambda chunk: the number of samples (or tokens) that the loss is the mean "
            "over",
        )


def report_other_mean(
    probe: Probe, index: int, split: Split, fit: Fit, tolerance: float, report: Report
) -> None:
    """Say how the loss of a whole differs from the mean of its parts', and why."""
    a, b = split.shares
    loss, one, two = fit.losses
    text = (
        f"parts of {split.sizes[0]} and {split.sizes[1]} samples of chunk {index} have the losses "
        f"{one:.5g} and {two:.5g}, whose mean by the weights {split.weights[0]:g} and "
        f"{split.weights[1]:g} is {a * one + b * two:.5g}; together they have {loss:.5g}"
    )
    if fit.residual > max(tolerance, 0.1 * fit.error):
        broadcast = _broadcast(probe, split)
        if broadcast:
            report.error("loss", text, *broadcast)
        else:
            report.doubt(
                "loss",
                text,
                "samples that influence each other (a contrastive loss, statistics over the "
                "batch), or a first dimension that is not the batch",
                "if that is meant, the chunks are part of the objective; else put the batch first, "
                "or pass weight=",
            )
        return
    text += f". In its gradient they count {fit.shares[0]:.3f} and {fit.shares[1]:.3f}, expected "
    text += f"{a:.3f} and {b:.3f}"
    total = sum(fit.shares)
    if abs(total - 1) < 0.05:
        report.error("weights", text, *_other_weights(probe, split, fit))
    elif abs(fit.shares[0] - 1) < 0.05 and abs(fit.shares[1] - 1) < 0.05:
        cure = "return the mean: divide by the number of samples"
        report.error("loss", text, "the loss sums over samples", cure)
    else:
        cure = "return the mean over the samples that weight= counts"
        report.error("loss", text, "a loss that is divided by something else", cure)


def _other_weights(probe: Probe, split: Split, fit: Fit) -> tuple[str, str]:
    by_samples = split.sizes[0] / sum(split.sizes)
    if abs(fit.shares[0] - by_samples) < 1e-3:
        return (
            "the loss is the mean over samples, which weight= does not count"
            if probe.closure.weight
            else "the first tensor of a chunk is not the batch",
            "return the number of samples from weight=",
        )
    try:
        with torch.enable_grad():
            refuse_other_means(0, probe.forward.differentiable(0, split.whole)[0])
    except ValueError as error:
        cause, _, cure = str(error).partition(": ")
        return cause, cure
    return (
        "class weights, masks or padding: the loss is a mean over something else than weight= "
        "counts",
        "pass weight=lambda chunk: what the loss divides by (tokens, masked entries, class "
        "weights)",
    )


def _broadcast(probe: Probe, split: Split) -> tuple[str, str] | None:
    """Cause and cure where outputs (n, 1) and targets (n,) broadcast to (n, n)."""
    if probe.closure.loss_fn is None:
        return None
    inputs, target = split.whole
    with torch.no_grad():
        output = probe.model(inputs)
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in (output, target)):
        return None
    here, there = tuple(output.shape), tuple(target.shape)
    if here == there or output.numel() != target.numel():
        return None
    return (
        f"outputs of shape {here} and targets of shape {there}, which broadcast",
        "give both the same shape, as target.view_as(output)",
    )
