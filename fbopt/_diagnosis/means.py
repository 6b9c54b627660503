"""Check that a chunk's loss is a mean by the closure's weights: with samples in two parts,
n L = n_1 L_1 + n_2 L_2, and the same for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fbopt._diagnosis.passes import distance
from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.report import Report
from fbopt._diagnosis.setup import last_size, rows
from fbopt._diagnosis.wide import CopyLoss, take

MOST_SAMPLES = 64
Gradient = Callable[[Any], tuple[float, list[Tensor]]]


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


def check_means(probe: Probe, chunks: Sequence[Any], report: Report) -> None:
    """Divide some samples of each chunk in two and compare, without dropout and BatchNorm."""
    _check_constant(probe, chunks, report)
    if probe.is_sharded:
        report.skip("loss", "parameters are sharded")
        return
    for index, chunk in enumerate(chunks):
        try:
            split = divide(probe, index, chunk)
            fit, tolerance = _fit(probe, split)
        except Exception as error:
            report.skip("loss", " ".join(str(error).split())[:150] or type(error).__name__)
            return
        report.note("loss")
        if fit.error > tolerance:
            _report(probe, index, split, fit, tolerance, report)
            return


def divide(probe: Probe, index: int, chunk: Any) -> Split:
    """Take two thirds and one third of a chunk's first samples."""
    length = rows(chunk)
    if length is None:
        raise ValueError("the tensors of a chunk have different lengths, so it cannot be divided")
    if length < 2:
        raise ValueError("a chunk of one sample cannot be divided")
    n = min(length, MOST_SAMPLES)
    first = max(1, round(2 * n / 3))
    whole = take(chunk, 0, n, length)
    parts = take(chunk, 0, first, length), take(chunk, first, n, length)
    sizes = first, n - first
    a, b = weights = probe.weight(index, parts[0]), probe.weight(index, parts[1])
    if a == b == probe.weight(index, whole):  # a constant, which says nothing about samples
        a, b = sizes
    return Split(whole, parts, sizes, weights, (a / (a + b), b / (a + b)))


def _check_constant(probe: Probe, chunks: Sequence[Any], report: Report) -> None:
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


def _fit(probe: Probe, split: Split) -> tuple[Fit, float]:
    """Compare in float64, or where the model cannot do that in its own dtype; and a tolerance."""
    wide = CopyLoss(probe)

    def double(chunk: Any) -> tuple[float, list[Tensor]]:
        loss, grads = wide.gradient(wide.start(), chunk)
        return float(loss), grads

    def single(chunk: Any) -> tuple[float, list[Tensor]]:
        loss, grads = probe.gradient(0, chunk)
        pairs = zip(grads, probe.params, strict=True)
        return float(loss), [torch.zeros_like(p) if g is None else g for g, p in pairs]

    problem: Exception | None = None
    for gradient, epsilon in ((double, 1e-12), (single, _epsilon(probe))):
        for modules in (list(probe.model.modules()), _noisy(probe.model)):
            try:
                with probe.modes(modules):
                    return compare(probe, gradient, split), epsilon**0.5
            except _Random:
                raise
            except Exception as error:
                problem = problem or error
    assert problem is not None
    raise problem


class _Random(RuntimeError):
    """The loss is random without dropout, so that parts cannot be compared."""


def compare(probe: Probe, gradient: Gradient, split: Split) -> Fit:
    """Fit the gradient of the whole by those of the parts."""
    probe.draws.begin()
    loss, g = gradient(split.whole)
    again, _ = gradient(split.whole)  # with the next random draws
    if abs(again - loss) > 1e-6 * abs(loss):
        raise _Random("the loss draws random numbers in eval mode, too")
    (one, g1), (two, g2) = (gradient(part) for part in split.parts)
    values = [loss, one, two, *(distance(x) for x in (g, g1, g2))]
    if not all(torch.isfinite(torch.tensor(values))):
        raise ValueError("a part of a chunk has no finite loss")
    a, b = split.shares
    scale = a * values[4] + b * values[5]
    expected = [a * x + b * y for x, y in zip(g1, g2, strict=True)]
    error = distance(g, expected) / scale if scale else 0.0
    size = a * abs(one) + b * abs(two)
    error = max(error, abs(loss - a * one - b * two) / size if size else 0.0)
    shares = _shares(g, g1, g2)
    fitted = [shares[0] * x + shares[1] * y for x, y in zip(g1, g2, strict=True)]
    residual = distance(g, fitted) / scale if scale else 0.0
    return Fit((loss, one, two), error, shares, residual)


def _shares(g: list[Tensor], g1: list[Tensor], g2: list[Tensor]) -> tuple[float, float]:
    """The numbers a, b that minimise ||g - a g1 - b g2||."""
    columns = torch.stack([_flat(g1), _flat(g2)], dim=1)
    found = torch.linalg.lstsq(columns.T @ columns, columns.T @ _flat(g)[:, None]).solution
    return float(found[0]), float(found[1])


def _flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.detach().double().cpu().reshape(-1) for g in grads])


def _epsilon(probe: Probe) -> float:
    dtypes = {p.dtype for p in probe.params} | {probe.closure.autocast or torch.float64}
    tf32 = 2.0**-11 if any(d.type == "cuda" for d in probe.devices) else 0.0
    return max(tf32, *(torch.finfo(dtype).eps for dtype in dtypes))


def _noisy(model: nn.Module) -> list[nn.Module]:
    """BatchNorm and dropout: a model that fails in eval mode may do without these alone."""
    return [m for m in model.modules() if isinstance(m, (_BatchNorm, _DropoutNd))]


def _report(
    probe: Probe, index: int, split: Split, fit: Fit, tolerance: float, report: Report
) -> None:
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
    loss_fn, by_samples = probe.closure.loss_fn, split.sizes[0] / sum(split.sizes)
    if abs(fit.shares[0] - by_samples) < 1e-3:
        return (
            "the loss is the mean over samples, which weight= does not count"
            if probe.closure.weight
            else "the first tensor of a chunk is not the batch",
            "return the number of samples from weight=",
        )
    if getattr(loss_fn, "weight", None) is not None:
        return (
            "class weights: the loss is a mean by the weights of the targets' classes",
            "pass weight=lambda chunk: loss_fn.weight[chunk[1]].sum()",
        )
    ignored = getattr(loss_fn, "ignore_index", -100)
    target = split.whole[1] if isinstance(split.whole, (tuple, list)) else None
    if isinstance(target, Tensor) and bool((target == ignored).any()):
        return (
            f"ignored targets ({ignored}): the loss is the mean over the others",
            f"pass weight=lambda chunk: (chunk[1] != {ignored}).sum()",
        )
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
