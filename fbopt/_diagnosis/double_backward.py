"""Check of a penalty's product H g by double backward, beside central differences in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fbopt._diagnosis.passes import distance
from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.report import Report
from fbopt._diagnosis.setup import some
from fbopt._diagnosis.wide import CopyLoss, difference, some_samples
from fbopt._engine.autograd_graph import function_name

FEW_SAMPLES = 4
# Relative to theta. Where ReLUs change sign differences settle at the smallest alone, where a model
# computes in float32 at the largest.
RADII = (1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-5, 1e-4, 1e-3)
SAME = 1e-3  # relative difference of one and the same product
CURE = "use method='central', or 'forward'"
Tensors = list[Tensor]


def check_double_backward(probe: Probe, chunk: Any, report: Report) -> str | None:
    """Compare at a point nearby, where no ReLU sits at its kink; return why it says nothing."""
    samples, loss = some_samples(chunk, FEW_SAMPLES), CopyLoss(probe)
    generator = torch.Generator().manual_seed(0)
    theta = [_nearby(t, generator) for t in loss.start()]
    probe.draws.begin()
    g, exact, every = loss.product(theta, samples)
    norm, suspect = distance(g), _suspect(every)
    report.note("double backward")
    if isinstance(exact, str):
        report.error("double backward", exact[:300], suspect, CURE)
        return None
    if norm == 0:
        return "the gradient is zero"
    exact = [h / norm for h in exact]
    wanted, apart = _settled(probe, loss, theta, samples, exact)
    scale = max(distance(wanted), distance(exact))
    off = distance(exact, wanted)
    if off <= SAME * scale:
        return None
    if apart > SAME * scale:
        return f"differences of the gradient do not settle: they vary by {apart / scale:.0%}"
    triples = zip(loss.names, exact, wanted, strict=True)
    wrong = [name for name, h, w in triples if distance([h], [w]) > SAME * scale]
    report.error(
        "double backward",
        f"||H g|| / ||g|| by double backward is {distance(exact):.4g}, by central differences in "
        f"float64 {distance(wanted):.4g}; they differ by {off / scale:.0%}, in {some(wrong)}",
        suspect,
        CURE,
    )
    return None


def _settled(
    probe: Probe, loss: CopyLoss, theta: Tensors, samples: Any, exact: Tensors
) -> tuple[Tensors, float]:
    """The difference that is `exact`, or changes least with the radius, and by how much it does."""
    size = max(distance(theta), 1e-3)
    best: tuple[Tensors, float] | None = None
    last: Tensors | None = None
    for radius in RADII:
        h = difference(probe, loss, theta, samples, radius * size, "central")[1]
        if distance(h, exact) <= SAME * distance(h):
            return h, 0.0
        change = math.inf if last is None else distance(h, last)
        if best is None or change < best[1]:
            best = h, change
        last = h
    assert best is not None
    return best


def _nearby(t: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
    spread = float(t.square().mean().sqrt()) if t.numel() else 0.0
    return t + 1e-3 * max(spread, 1e-2) * noise


def _suspect(every: list[Any]) -> str:
    """Name what in a graph is known to have a wrong double backward, or may have one."""
    if any("WeightNorm" in node.name() for node in every):
        return "weight_norm, whose double backward in torch is wrong"
    custom = sorted({function_name(n) for n in every if isinstance(n, BackwardCFunction)})
    if custom:
        return f"a custom autograd function whose backward makes no graph: {some(custom)}"
    return "an operation whose backward makes no graph, or a detach() in it"
