"""The eigenspace at the edge of stability that a flow treats apart, and what holds it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbopt.analysis import complementarity
from fbopt.analysis.basis import Array
from fbopt.analysis.flow_rules import Descent, Scale
from fbopt.analysis.objective import Objective
from fbopt.analysis.third_derivatives import curvature_gradients, triangle


@dataclass(frozen=True)
class Edge:
    """The eigenspace that a sub-step treats apart, k eigenvectors u_i: H u_i = lambda_i P u_i.

    Attributes:
        values: lambda_1 to lambda_k, (k,) float64, the largest first.
        vectors: u_1 to u_k, (k, P), with ``u_i.(P u_j) = 1`` for i = j, else 0; P = 1 for gradient
            descent.
        covariance: X, (k, k) float64, positive semidefinite: the covariance of the oscillation
            along them, ``Sigma = sum_ij X_ij u_i u_j^T``; zero unless the flow is a central flow.
        slack: S, (k, k) float64: the room below 2/lr that the eigenvalues are to have after the
            sub-step, divided by its length. S >= 0 and <S, X> = 0.
    """

    values: Array
    vectors: Tensor
    covariance: Array
    slack: Array

    @classmethod
    def without_oscillation(cls, values: Array, vectors: Tensor) -> Edge:
        """An edge with X = 0."""
        zero = np.zeros((len(values), len(values)))
        return cls(values, vectors, zero, zero)

    @property
    def excess_loss(self) -> float:
        """``1/2 <H, Sigma>``: how far the mean loss of the oscillating steps is above L."""
        return float(np.diag(self.covariance) @ self.values / 2)


class Held(NamedTuple):
    """An edge with the effects of its oscillation.

    Attributes:
        edge: the edge.
        drift: ``1/2 grad<H, Sigma>``, (P,).
        squares: diag(H Sigma H), what the oscillation adds to the mean of g^2, (P,) float64.
    """

    edge: Edge
    drift: Tensor
    squares: Scale


def hold(objective: Objective, rule: Descent, edge: Edge, time: float, length: float) -> Held:
    """The oscillation that lets no eigenvalue of the edge rise above 2/lr in a sub-step.

    Args:
        objective: the loss.
        rule: of the steps.
        edge: the eigenspace, without an oscillation.
        time: of the sub-step's beginning.
        length: h, the sub-step's.
    """
    limit, vectors = 2 / rule.lr, edge.vectors
    rows = curvature_gradients(objective, vectors)
    wide, gradient = rows.double(), objective.gradient().double()
    scale = rule.scale(rule.nu)
    room = np.diag(limit - edge.values) / length
    constant = torch.from_numpy(complementarity.entries_of(room)).to(wide)
    constant = constant + rule.lr * wide @ (gradient / scale)
    gram = wide @ (wide / scale).T * (rule.lr / 2)
    if rule.nu is not None:  # P moves: 2/lr u_i.(P' u_j), with P' = nu'/(2 sqrt(nu))
        pairs = _products(vectors.double())
        half = torch.where(rule.nu > 0, rule.nu.rsqrt() / 2, 0)
        moved = rule.rate(time) * (gradient.square() - rule.nu)
        constant = constant + limit * pairs @ (half * moved)
        # At the edge H u = 2/lr P u, which keeps the problem symmetric.
        kept = pairs * (half * rule.rate(time)).sqrt() * scale
        gram = gram + limit**3 * kept @ kept.T
    covariance, slack = complementarity.solve(constant.cpu().numpy(), gram.cpu().numpy())
    weights = torch.from_numpy(complementarity.entries_of(covariance)).to(rows)
    held = Edge(edge.values, vectors, covariance, slack)
    squares: Scale = 0.0
    if rule.nu is not None:
        values = torch.from_numpy(edge.values).to(pairs)
        squares = weights.double() @ _products(vectors.double() * values[:, None] * scale)
    return Held(held, weights @ rows / 2, squares)


def _products(vectors: Tensor) -> Tensor:
    """``u_i * u_j`` for i <= j, as rows in the order and scale of :func:`curvature_gradients`."""
    return torch.stack([
        vectors[i] * vectors[j] * (1 if i == j else 2**0.5) for i, j in triangle(len(vectors))
    ])  # fmt: skip
