"""Check of a penalty's radius: its differences of gradients beside the same in float64, and its
length beside that of all parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from fbopt._diagnosis.passes import distance
from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.report import Report
from fbopt._diagnosis.wide import CopyLoss, difference, moved, some_samples
from fbopt._direction import PerturbationRule
from fbopt._engine.autograd_graph import dtypes

MOST_SAMPLES = 32
LOST = 5.0  # rounding errors this many times as large as a difference leave nothing of it


def check_radius(probe: Probe, penalty: PerturbationRule, chunk: Any, report: Report) -> str | None:
    """Compare on some samples of a chunk; return the reason where that says nothing."""
    samples = some_samples(chunk, MOST_SAMPLES)
    wide, own = CopyLoss(probe), CopyLoss(probe, None)
    theta, radius = wide.start(), penalty.radius
    g, h = difference(probe, own, own.start(), samples, radius, penalty.method)
    true_g, true_h = difference(probe, wide, theta, samples, radius, penalty.method)
    if distance(g, true_g) > 0.3 * distance(true_g):
        return "the model computes other gradients in float64"
    report.note("radius")
    error, size = distance(h, true_h), distance(true_h)
    weight = float(penalty.coefficient_at(probe.closure.step, probe.closure.optimizer))
    if weight * error > 0.01 and (error > size or distance(h) < 0.1 * size):
        lost = error > LOST * size or distance(h) < 0.1 * size
        (report.error if lost else report.doubt)(
            "radius",
            f"the penalty's difference of gradients at radius={radius:g} has the norm "
            f"{distance(h):.3g}, in float64 {size:.3g}: its rounding error is "
            f"{error / size:.2g} times as large as what is measured, expected well below 1",
            f"a radius too small for {_precision(probe, samples)}",
            f"a larger radius, such as {max(10 * radius, 0.01):g}; method='exact'; or no autocast",
        )
    whole = distance(theta)
    if radius > whole / 2:
        loss, there = (wide.value(t, samples) for t in (theta, moved(theta, g, radius)))
        report.doubt(
            "radius",
            f"radius={radius:g} is {radius / whole:.2g} times the norm of all parameters, "
            f"{whole:.3g}: the loss there is {there:.4g}, here {loss:.4g}",
            "a radius too large for a difference that stands for a derivative",
            "radius=0.01 is the published value",
        )
    return None


def _precision(probe: Probe, samples: Any) -> str:
    """The coarsest dtype that the loss is computed in."""
    with torch.enable_grad():
        found = dtypes(probe.forward(0, samples)[0]) | {p.dtype for p in probe.params}
    probe.buffers.restore()
    return str(max(found, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")
