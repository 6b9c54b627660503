"""Checks of a penalty's product H g: a double backward beside central differences, and differences
at the penalty's radius beside the same in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.dropout import _DropoutNd

from fbopt._diagnosis.passes import distance
from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.report import Report
from fbopt._diagnosis.setup import rows, some
from fbopt._diagnosis.wide import CopyLoss, take
from fbopt._engine.autograd_graph import dtypes, function_name, nodes
from fbopt._engine.perturb import hessian_gradient_product

FEW_SAMPLES, MOST_SAMPLES = 4, 64
RADII = (1e-6, 1e-7, 1e-8)  # relative to theta; so small that hardly a ReLU changes sign
LOST = 5.0  # rounding errors this many times as large as a difference leave nothing of it
CURE = "use method='central', or 'forward'"
SAME, OTHER = 1e-3, 1e-2  # relative differences of one and the same product, and of others
Tensors = list[Tensor]


def check_derivatives(probe: Probe, chunk: Any, report: Report) -> None:
    """Check the penalty's product H g on some samples of a chunk."""
    penalty = probe.closure.penalty
    if penalty is None:
        return
    about, check = ("radius", _check_radius)
    if penalty.method == "exact":
        about, check = ("double backward", _check_double_backward)
    if probe.is_sharded:
        report.skip(about, "parameters are sharded")
        return
    try:
        with _without_dropout(probe):
            reason = check(probe, chunk, report)
    except Exception as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
    if reason:
        report.skip(about, reason)


@contextlib.contextmanager
def _without_dropout(probe: Probe) -> Iterator[None]:
    """Masks are drawn differently in float64."""
    modules = [m for m in probe.model.modules() if isinstance(m, _DropoutNd)]
    with probe.modes(modules):
        yield


def _some_samples(chunk: Any, most: int) -> Any:
    length = rows(chunk)
    return chunk if length is None else take(chunk, 0, most, length)


def moved(theta: Tensors, along: Tensors, radius: float) -> Tensors:
    """Theta + radius v / ||v||."""
    step = radius / distance(along)
    return [t + (step * v).to(t.dtype) for t, v in zip(theta, along, strict=True)]


def difference(
    probe: Probe, loss: CopyLoss, theta: Tensors, chunk: Any, radius: float, method: str
) -> tuple[Tensors, Tensors]:
    """The gradient g, and H g / ||g|| by forward or central differences of this radius."""

    def gradient(at: Tensors) -> Tensors:
        probe.draws.rewind()
        torch.clear_autocast_cache()
        return [g.detach() for g in loss.gradient(at, chunk)[1]]

    probe.draws.begin()
    g = gradient(theta)
    if distance(g) == 0:
        raise ValueError("the gradient is zero")
    plus, minus, width = gradient(moved(theta, g, radius)), g, radius
    if method == "central":
        minus, width = gradient(moved(theta, g, -radius)), 2 * radius
    pairs = zip(plus, minus, strict=True)
    return g, [(p.double() - m.double()) / width for p, m in pairs]


def _check_double_backward(probe: Probe, chunk: Any, report: Report) -> str | None:
    """Compare at a point nearby, where no ReLU sits at its kink; return why it says nothing."""
    samples, loss = _some_samples(chunk, FEW_SAMPLES), CopyLoss(probe)
    generator = torch.Generator().manual_seed(0)
    theta = [_nearby(t, generator) for t in loss.start()]
    size = max(distance(theta), 1e-3)
    products = [difference(probe, loss, theta, samples, r * size, "central")[1] for r in RADII]
    probe.draws.rewind()
    report.note("double backward")
    value, grads = loss.gradient(theta, samples, graph=True)
    norm, suspect = distance(grads), _suspect(value)
    try:
        exact = [h / norm for h in hessian_gradient_product(grads, loss.leaves)]
    except RuntimeError as error:
        found = " ".join(str(error).split())[:200]
        report.error("double backward", f"it fails: {found}", suspect, CURE)
        return None
    scale = max(distance(products[1]), distance(exact))
    if scale == 0 or min(distance(exact, h) for h in products) < SAME * scale:
        return None
    apart = max(distance(products[1], h) for h in products)
    if apart > SAME * scale:
        report.checked.remove("double backward")
        return f"differences of the gradient do not settle: they vary by {apart / scale:.0%}"
    wrong = [
        name
        for name, h, wanted in zip(loss.names, exact, products[1], strict=True)
        if distance([h], [wanted]) > OTHER * scale
    ]
    report.error(
        "double backward",
        f"||H g|| / ||g|| by double backward is {distance(exact):.4g}, by central differences in "
        f"float64 {distance(products[1]):.4g}; they differ by "
        f"{distance(exact, products[1]) / scale:.0%}, in {some(wrong or loss.names)}",
        suspect,
        CURE,
    )
    return None


def _nearby(t: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
    spread = float(t.square().mean().sqrt()) if t.numel() else 0.0
    return t + 1e-3 * max(spread, 1e-2) * noise


def _suspect(loss: Tensor) -> str:
    """Name what in the graph is known to have a wrong double backward, or may have one."""
    every = list(nodes(loss))
    if any("WeightNorm" in node.name() for node in every):
        return "weight_norm, whose double backward in torch is wrong"
    custom = sorted({function_name(n) for n in every if isinstance(n, BackwardCFunction)})
    if custom:
        return f"a custom autograd function whose backward makes no graph: {some(custom)}"
    return "an operation whose backward makes no graph, or a detach() in it"


def _check_radius(probe: Probe, chunk: Any, report: Report) -> str | None:
    """Compare differences at the penalty's radius in the closure's precision and in float64."""
    penalty, samples = probe.closure.penalty, _some_samples(chunk, MOST_SAMPLES)
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
        loss, there = (
            float(wide.gradient(t, samples)[0]) for t in (theta, moved(theta, g, radius))
        )
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
