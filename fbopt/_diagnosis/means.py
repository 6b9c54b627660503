"""Check that a chunk's loss is a mean by the closure's weights: with samples in two parts,
n L = n_1 L_1 + n_2 L_2, and the same for the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fbopt._diagnosis.mean_causes import Fit, Split, check_constant, report_other_mean
from fbopt._diagnosis.passes import distance
from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.report import Report
from fbopt._diagnosis.setup import rows
from fbopt._diagnosis.wide import CopyLoss, take
from fbopt._engine.modes import measuring

MOST_SAMPLES = 32


def check_means(probe: Probe, chunks: Sequence[Any], report: Report) -> None:
    """Divide some samples of each chunk in two and compare, without dropout and BatchNorm."""
    check_constant(probe, chunks, report)
    if probe.is_sharded:
        report.skip("loss", "parameters are sharded")
        return
    problem = ""
    for index, chunk in enumerate(chunks):
        try:
            split = divide(probe, index, chunk)
            fit, tolerance = _fit(probe, split)
        except Exception as error:
            problem = " ".join(str(error).split())[:150] or type(error).__name__
            continue
        report.note("loss")
        if fit.error > tolerance:
            report_other_mean(probe, index, split, fit, tolerance, report)
            return
    if "loss" not in report.checked:
        report.skip("loss", problem)


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


def _fit(probe: Probe, split: Split) -> tuple[Fit, float]:
    """Compare in float64, or where the model cannot do that in its own dtype; and a tolerance."""
    problem: Exception | None = None
    for passes, epsilon in ((_Wide(probe), 1e-12), (_Own(probe), _epsilon(probe))):
        for modes in (measuring(probe.model, "frozen", "off"), probe.modes(_noisy(probe.model))):
            try:
                with modes:
                    return compare(passes, split), epsilon**0.5
            except _Random:
                raise
            except Exception as error:
                problem = problem or error
    assert problem is not None
    raise problem


class _Wide:
    """Passes in float64."""

    def __init__(self, probe: Probe) -> None:
        self._loss = CopyLoss(probe)
        self._theta = self._loss.start()

    def value(self, chunk: Any) -> float:
        return self._loss.value(self._theta, chunk)

    def gradient(self, chunk: Any) -> tuple[float, list[Tensor]]:
        return self._loss.gradient(self._theta, chunk)


class _Own:
    """Passes as the closure makes them."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def value(self, chunk: Any) -> float:
        loss = float(self._probe.forward(0, chunk)[0])
        self._probe.buffers.restore()
        return loss

    def gradient(self, chunk: Any) -> tuple[float, list[Tensor]]:
        loss, grads = self._probe.gradient(0, chunk)
        pairs = zip(grads, self._probe.params, strict=True)
        return float(loss), [torch.zeros_like(p) if g is None else g for g, p in pairs]


class _Random(RuntimeError):
    """The loss is random without dropout, so that parts cannot be compared."""


def compare(passes: _Wide | _Own, split: Split) -> Fit:
    """Fit the gradient of the whole by those of the parts."""
    loss, g = passes.gradient(split.whole)
    if abs(passes.value(split.whole) - loss) > 1e-6 * abs(loss):  # with the next random draws
        raise _Random("the loss draws random numbers in eval mode, too")
    (one, g1), (two, g2) = (passes.gradient(part) for part in split.parts)
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
