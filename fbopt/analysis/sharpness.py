"""Curvature along one direction: d.H d/|d|^2, and the critical sharpness 2/eta_c from losses alone,
with eta_c the step along an update at which the loss is back at its value before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.checks import check
from fbopt.analysis.directions import check_direction
from fbopt.analysis.hessian import Hessian
from fbopt.analysis.objective import Objective
from fbopt.analysis.operator import Operator


def directional_sharpness(
    objective: Objective, direction: Tensor | None = None, *, hessian: Operator | None = None
) -> float:
    """The curvature of L along a direction, ``d.H d / |d|^2``.

    Along the gradient, a step of gradient descent with learning rate lr lowers the quadratic model
    of L if this is below 2/lr. It is at most the largest eigenvalue of H. Costs a product, and a
    gradient where no direction is given.

    Args:
        objective: the loss; under autocast H is that of the autocast forward pass.
        direction: d, a vector (see :class:`Objective`) of any length. Default: the gradient.
        hessian: an operator of the objective in place of the exact :class:`Hessian`.

    Raises:
        ValueError: the direction is zero (at a stationary point: give one), not finite or of
            another length.
        RuntimeError: as for :class:`Hessian`.
    """
    hessian = Hessian(objective) if hessian is None else hessian
    if direction is None:
        direction = objective.gradient()
    direction = as_vector(objective, direction)
    norm = check_direction(direction, "give one; the gradient is zero at a stationary point")
    unit = (direction.double() / norm).to(objective.dtype)
    return float(unit.double() @ hessian.finite(unit).double() / unit.double().square().sum())


@dataclass(frozen=True)
class CriticalSharpness:
    """The curvature that a step along an update meets, measured by losses alone.

    Attributes:
        value: 2/step; where the loss never rose, an upper bound.
        step: eta_c, in multiples of the update; where the loss never rose, the longest step tried.
        reached: whether the loss rose within the limit.
        losses: the number of losses that it took.
    """

    value: float
    step: float
    reached: bool
    losses: int


def critical_sharpness(
    objective: Objective,
    update: Tensor | None = None,
    *,
    start: float | None = None,
    precision: float = 0.01,
    limit: float = 2.0**20,
) -> CriticalSharpness:
    """Find the largest step along an update that does not raise the loss; return 2/step.

    Kalra, Gagnon-Audet, Gromov, Mediratta, Niu, Miller, Shvartsman, "A Scalable Measure of Loss
    Landscape Curvature for Analyzing the Training Dynamics of LLMs" (arXiv 2601.16979). With eta_c
    the step at which the loss first is at its value before the update again::

        L(theta + eta_c d) = L(theta)          critical sharpness = 2/eta_c

    On a quadratic with d = -g it is g.H g/|g|^2, the :func:`directional_sharpness`, and in general
    ``-d.H d/(g.d)``. The step grows or shrinks by factors of 2 until the loss rises beyond it and
    not before it; then secant steps on ``(L(theta + eta d) - L(theta))/eta``, which is linear in
    eta on a quadratic. That takes five to six losses from a start within a factor of 4. (A rise
    and fall between two points of the search go unnoticed.) There are no second derivatives, so it
    works with fused attention; rounding hides eta_c where ``L(theta)`` is near its least value
    along d: in bfloat16 a loss has two to three digits.

    Args:
        objective: the loss; under autocast that of the autocast forward pass.
        update: d, a vector that the loss falls along at first: the change that a step of an
            optimizer makes, so that eta_c is in multiples of that step. Default: minus the
            gradient, so that eta_c is a learning rate.
        start: the first step that is tried, such as the last eta_c. Default: 1 with an update; for
            the gradient L/|g|^2, the Polyak step to a loss of 0.
        precision: relative precision of eta_c.
        limit: the search ends at this multiple of `start`, and 1/limit of it.

    Raises:
        TypeError, ValueError: an invalid argument; the loss rises along the update however short
            the step is, so that it is no descent direction.
        RuntimeError: the loss is not deterministic.
    """
    check_number("precision", precision, above=0)
    check_number("limit", limit, above=1)
    if start is not None:
        check_number("start", start, above=0)
    check(objective)
    direction = -objective.gradient() if update is None else as_vector(objective, update)
    norm = check_direction(direction, "give one; the gradient is zero at a stationary point")
    base, count = objective.loss(), 1
    if start is None:
        start = 1.0 if update is not None or base <= 0 else base / norm**2

    def slope(step: float) -> float:
        nonlocal count
        count += 1
        found = (objective.loss(step * direction) - base) / step
        return math.inf if math.isnan(found) else found

    step, reached = _crossing(slope, float(start), precision, limit)
    return CriticalSharpness(2 / step, step, reached, count)


def _crossing(
    slope: Callable[[float], float], start: float, precision: float, limit: float
) -> tuple[float, bool]:
    """The step at which a function rises through zero, and whether it does within the limit."""
    step, value = start, slope(start)
    rising = value > 0
    while True:
        other = step / 2 if rising else step * 2
        if not start / limit <= other <= start * limit:
            break
        found = slope(other)
        if (found > 0) != rising:
            ends = sorted([(step, value), (other, found)])
            return _secant(slope, ends[0], ends[1], precision), True
        step, value = other, found
    if rising:
        raise ValueError(
            "update does not lower the loss: it rises at a step of "
            f"{step:.3g} times the update and at all longer ones that were tried. Give the change "
            "of the parameters (such as minus the gradient), or a smaller start"
        )
    return step, False


def _secant(
    slope: Callable[[float], float],
    low: tuple[float, float],
    high: tuple[float, float],
    precision: float,
) -> float:
    """The zero between two steps with values below (or at) and above zero.

    Secant steps, which are exact for a linear function; halving after one that leaves more than
    half of the value, as where the loss explodes beyond the zero.
    """
    (a, below), (b, above) = low, high
    least, previous, value, halve = 0.1 * min(-below, above), math.inf, math.inf, False
    while b - a > precision * b:
        secant = a - below * (b - a) / (above - below)
        estimate = (a + b) / 2 if halve or not math.isfinite(above) else secant
        if abs(estimate - previous) <= precision * estimate and abs(value) <= least:
            return estimate
        value, previous = slope(estimate), estimate
        halve = abs(value) > (above if value > 0 else -below) / 2
        if value > 0:
            b, above = estimate, value
        else:
            a, below = estimate, value
    return a


def as_vector(objective: Objective, direction: Tensor) -> Tensor:
    """A direction in the dtype and on the device of the objective's vectors, of their length."""
    if not isinstance(direction, Tensor):
        raise TypeError(
            f"the direction must be a vector, got {type(direction).__name__}: "
            "objective.flatten(tensors) makes one of a tensor for each parameter"
        )
    if direction.shape != (objective.size,):
        raise ValueError(
            f"the direction has shape {tuple(direction.shape)}, but vectors of this objective have "
            f"({objective.size},): objective.flatten(tensors) makes one"
        )
    return direction.detach().to(objective.device, objective.dtype)
