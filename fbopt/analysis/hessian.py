"""Hessian-vector products H v of the full-batch loss, exact or by finite differences."""

from __future__ import annotations

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt._engine.inputs import refuse_compiled
from fbopt.analysis.checks import check
from fbopt.analysis.objective import Objective

METHODS = ("exact", "central", "forward")


class Hessian:
    """The Hessian of L at the model's parameters, as a linear operator: ``hessian(v)`` is H v.

    - ``exact``: a second backward pass per chunk. (A custom autograd function marked
      ``once_differentiable`` is taken for a linear one: torch does not report it.)
    - ``central``: ``(grad L(theta + r u) - grad L(theta - r u)) |v|/2r`` with ``u = v/|v|``, two
      gradients per product, error of second order in r.
    - ``forward``: ``(grad L(theta + r u) - grad L(theta)) |v|/r``, one gradient per product and
      one at the beginning, error of first order.

    Where the gradient jumps (ReLU, max pooling) finite differences count the jumps within the
    radius and do not converge as it shrinks; the exact product leaves them out. docs/analysis.md
    has numbers.

    Args:
        objective: the loss.
        method: one of the above.
        radius: r, a length in parameter space. Default: for central differences
            ``eps**(1/3) max(1, |theta|)/4``, for forward ones ``eps**(1/2) max(1, |theta|)/4``,
            with eps the machine epsilon of the parameters or, if it is larger, of autocast's dtype:
            rounding and truncation errors are then about equal.

    Attributes:
        products: the number of products so far.

    Raises:
        TypeError, ValueError: an invalid argument; weights or a loss that are not finite.
        RuntimeError: a loss that is not deterministic; ``exact`` and a compiled model.
    """

    def __init__(
        self, objective: Objective, method: str = "exact", radius: float | None = None
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if radius is not None:
            check_number("radius", radius, above=0)
        if method == "exact":
            refuse_compiled(objective.model)
        check(objective)
        self.objective, self.method = objective, method
        order = 1 / 3 if method == "central" else 1 / 2
        length = max(1.0, float(objective.theta().double().norm()))
        self.radius = objective.epsilon**order * length / 4 if radius is None else radius
        self.products = 0
        self._gradient = objective.gradient() if method == "forward" else None

    def __call__(self, vector: Tensor) -> Tensor:
        """Return H v for a vector of the parameter space (see :class:`Objective`)."""
        self.products += 1
        if self.method == "exact":
            try:
                return self.objective.product(vector)
            except RuntimeError as error:
                if "derivative" not in str(error) and "double backward" not in str(error):
                    raise
                raise RuntimeError(
                    f"the model cannot be differentiated twice ({error}): pass method='central'"
                ) from error
        norm = float(vector.double().norm())
        if norm == 0:
            return torch.zeros_like(vector)
        shift = vector * (self.radius / norm)
        up = self.objective.gradient(shift)
        if self._gradient is not None:  # forward
            return (up - self._gradient) * (norm / self.radius)
        return (up - self.objective.gradient(-shift)) * (norm / (2 * self.radius))
