"""Hessian-vector products H v of the full-batch loss, exact or by finite differences, and the trace
by Hutchinson's estimator: tr(H) = E z.(H z) for random signs z.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt._engine.inputs import refuse_compiled
from fbopt.analysis.directions import random_signs
from fbopt.analysis.objective import Objective
from fbopt.analysis.operator import Operator

METHODS = ("exact", "central", "forward")


class Hessian(Operator):
    """The Hessian of L at the model's parameters, as a linear operator: ``hessian(v)`` is H v.

    - ``exact``: a second backward pass per chunk. Functions whose second derivative would be lost
      without a word are refused at the first product.
    - ``central``: ``(grad L(theta + r u) - grad L(theta - r u)) |v|/2r`` with ``u = v/|v|``, two
      gradients per product, error of second order in r.
    - ``forward``: ``(grad L(theta + r u) - grad L(theta)) |v|/r``, one gradient per product and
      one at the beginning, error of first order.

    Where the gradient jumps (ReLU, max pooling) finite differences count the jumps within the
    radius and do not converge as it shrinks; the exact product leaves them out. docs/analysis.md
    has numbers. In bfloat16 or float16, also by autocast within ``evaluate``, finite differences
    are inaccurate, since the gradients' rounding is as large as their difference: a RuntimeWarning
    says so, use exact products there.

    The operator belongs to the parameters, and buffers that the loss reads, at which it was made.
    Once they have changed, by a step or otherwise, products are refused until :meth:`refresh`. To
    find out it keeps a copy of them.

    Args:
        objective: the loss.
        method: one of the above.
        radius: r, a length in parameter space. Default: for central differences
            ``eps**(1/3) max(1, |theta|)/4``, for forward ones ``eps**(1/2) max(1, |theta|)/4``,
            with eps the machine epsilon of the coarsest dtype that the passes compute in: rounding
            and truncation errors are then about equal.

    Attributes:
        products: the number of products so far.
        radius: r.

    Raises:
        TypeError, ValueError: an invalid argument; weights or a loss that are not finite.
        RuntimeError: a loss that is not deterministic; ``exact`` and a compiled model; a product
            after the model has changed.
    """

    name, variable = "Hessian", "hessian"

    def __init__(
        self, objective: Objective, method: str = "exact", radius: float | None = None
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if radius is not None:
            check_number("radius", radius, above=0)
        if method == "exact":
            refuse_compiled(objective.model)
        super().__init__(objective)
        self.method, self._given_radius = method, radius
        self.refresh()

    def refresh(self) -> None:
        """Move the operator to the model's current parameters."""
        super().refresh()
        objective, method = self.objective, self.method
        if method != "exact" and objective.epsilon > 1e-4:
            warnings.warn(
                f"method={method!r} differences gradients that are rounded to "
                f"{objective.epsilon:g} of their size (bfloat16 or float16): products are "
                "inaccurate; pass method='exact', or measure in float32",
                RuntimeWarning,
                stacklevel=3,
            )
        order = 1 / 3 if method == "central" else 1 / 2
        length = max(1.0, float(objective.theta().double().norm()))
        default = objective.epsilon**order * length / 4
        self.radius = default if self._given_radius is None else self._given_radius
        self._is_differentiable = False  # twice; looked for in the first product
        self._gradient = objective.gradient() if method == "forward" else None

    def _product(self, vector: Tensor) -> Tensor:
        if self.method == "exact":
            product = self.objective.product(vector, check=not self._is_differentiable)
            self._is_differentiable = True
            return product
        norm = float(vector.double().norm())
        if norm == 0:
            return torch.zeros_like(vector)
        shift = vector * (self.radius / norm)
        up = self.objective.gradient(shift)
        if self._gradient is not None:  # forward
            return (up - self._gradient) * (norm / self.radius)
        return (up - self.objective.gradient(-shift)) * (norm / (2 * self.radius))


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace with its standard error.

    Attributes:
        value: the mean of ``z.(H z)`` over the samples.
        error: its standard error, the samples' standard deviation divided by the square root of
            their number.
        samples: the number of samples, of one product each.
    """

    value: float
    error: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Trace:
        """The mean of independent samples, at least two, and its standard error."""
        found = torch.tensor(values, dtype=torch.float64)
        return cls(float(found.mean()), float(found.std()) / math.sqrt(len(found)), len(found))


def hessian_trace(hessian: Operator, samples: int = 32, seed: int = 0) -> Trace:
    """Estimate the trace of the full-batch Hessian, or of another operator.

    With Rademacher vectors the variance of one sample is ``2 sum_{i != j} H_ij^2``, the least among
    independent entries (Hutchinson 1990; Avron and Toledo, JACM 2011).

    Args:
        hessian: the operator, a :class:`Hessian` or another :class:`Operator`.
        samples: the number of random vectors, with one product each; at least 2.
        seed: of the vectors; sample i is the same however many there are.

    Raises:
        TypeError, ValueError: `samples` is not a number or too small.
    """
    check_number("samples", samples, least=2)
    objective = hessian.objective
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(samples):
        vector = random_signs(objective, generator)
        values.append(float(vector.double() @ hessian(vector).double()))
    return Trace.of(values)
