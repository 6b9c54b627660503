"""The density of an operator's eigenvalues by stochastic Lanczos quadrature: with random unit
vectors u, tr f(A)/P = E u.f(A)u ~ sum_k w_k f(x_k), x_k the eigenvalues of a tridiagonal matrix.

Ubaru, Chen, Saad (SIAM J. Matrix Anal. Appl. 38, 2017); for networks Ghorbani, Krishnan, Xiao, "An
Investigation into Neural Net Optimization via Hessian Eigenvalue Density" (arXiv 1901.10159).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from fbopt._checks import check_number
from fbopt._random import mix
from fbopt.analysis.basis import Array, Basis
from fbopt.analysis.hessian import Trace
from fbopt.analysis.operator import Operator


@dataclass(frozen=True)
class SpectralDensity:
    """The eigenvalues of a symmetric operator as a distribution of total weight 1.

    Attributes:
        nodes: places on the axis of the eigenvalues, float64, in ascending order.
        weights: their shares, float64, of sum 1; that of one eigenvalue is 1/size.
        means, squares: for each random vector u, ``u.A u`` and ``|A u|^2``.
        size: P, the number of eigenvalues.
        products: the number of products with the operator.
    """

    nodes: Array
    weights: Array
    means: Array
    squares: Array
    size: int
    products: int

    def cdf(self, x: ArrayLike) -> Array:
        """The share of the eigenvalues that are at most x, a staircase; x of any shape."""
        places = np.searchsorted(self.nodes, np.asarray(x, dtype=np.float64), side="right")
        return np.concatenate([[0.0], np.cumsum(self.weights)])[places]

    def density(self, x: ArrayLike, width: float) -> Array:
        """The density at x, of integral 1: each node a Gaussian of standard deviation `width`."""
        check_number("width", width, above=0)
        return smoothed(self.nodes, self.weights, x, width)

    @property
    def trace(self) -> Trace:
        """The operator's trace, with the standard error over the random vectors."""
        return Trace.of((self.size * self.means).tolist())

    @property
    def squared_trace(self) -> Trace:
        """tr(A^2), the squared Frobenius norm, with the standard error."""
        return Trace.of((self.size * self.squares).tolist())


def smoothed(nodes: Array, weights: Array, x: ArrayLike, width: float) -> Array:
    """The sum over the nodes of Gaussians of standard deviation `width`, at x."""
    apart = (np.asarray(x, dtype=np.float64)[..., None] - nodes) / width
    bells = np.exp(-(apart**2) / 2) / (width * math.sqrt(2 * math.pi))
    return np.asarray(bells @ weights)


def spectral_density(
    operator: Operator, probes: int = 5, steps: int = 80, *, seed: int = 0
) -> SpectralDensity:
    """Estimate the distribution of all eigenvalues of an operator.

    Lanczos iterations from each of `probes` random unit vectors give as many nodes as `steps`, with
    the squared first components of the tridiagonal matrix's eigenvectors as weights: for each
    vector, polynomials up to degree 2 steps - 1 are integrated exactly. Separate eigenvalues at the
    ends of the spectrum are single nodes of weight about 1/P; the bulk is resolved to about its
    range over `steps`. Costs up to probes times steps products, and one vector of memory per step.

    Args:
        operator: a :class:`Hessian` or another operator.
        probes: the number of random vectors, at least 2.
        steps: the number of products for each; fewer are made where the Krylov space is exhausted,
            as the quadrature is exact then.
        seed: of the vectors; vector i is the same however many there are.

    Raises:
        TypeError, ValueError: an invalid argument; products that are not finite.
        RuntimeError: the model has changed since the operator was made.
    """
    check_number("probes", probes, least=2)
    check_number("steps", steps, least=2)
    objective, start = operator.objective, operator.products
    found = [_quadrature(operator, steps, mix(seed, probe)) for probe in range(probes)]
    nodes = np.concatenate([nodes for nodes, _ in found])
    weights = np.concatenate([weights for _, weights in found]) / probes
    order = np.argsort(nodes, kind="stable")
    return SpectralDensity(
        nodes=nodes[order],
        weights=weights[order],
        means=np.array([weights @ nodes for nodes, weights in found]),
        squares=np.array([weights @ nodes**2 for nodes, weights in found]),
        size=objective.size,
        products=operator.products - start,
    )


def _quadrature(operator: Operator, steps: int, seed: int) -> tuple[Array, Array]:
    """Nodes and weights from one random vector."""
    objective = operator.objective
    like = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    basis = Basis(like, seed)
    vector, diagonal, off = basis.random(), [], list[float]()
    for _ in range(min(steps, objective.size)):
        basis.add(vector)
        image = operator.finite(vector)
        coefficients, rest = basis.orthogonalize(image)
        diagonal.append(float(coefficients[-1]))
        off.append(float(rest.double().norm()))
        norm = max(map(abs, [*diagonal, *off]))
        if off[-1] <= 50 * torch.finfo(image.dtype).eps * norm:
            break
        vector = rest / off[-1]
    between = off[: len(diagonal) - 1]
    matrix = np.diag(diagonal) + np.diag(between, 1) + np.diag(between, -1)
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2
