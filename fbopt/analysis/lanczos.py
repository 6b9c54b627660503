"""Extreme eigenvalues of a symmetric operator by Lanczos iterations from a random vector, with full
reorthogonalisation: a tridiagonal matrix T = V^T H V.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fbopt.analysis.basis import Array, Basis
from fbopt.analysis.operator import Operator
from fbopt.analysis.spectrum import Eigenpairs, Wanted


def eigenpairs_from_random(
    like: Tensor, hessian: Operator, wanted: Wanted, max_products: int, seed: int
) -> Eigenpairs:
    """Wanted eigenpairs of the operator on vectors such as `like`."""
    basis, matrix = Basis(like, seed), _Tridiagonal(wanted)
    products = _iterate(hessian, basis, matrix, max_products)
    return matrix.result(basis, products)


def _iterate(hessian: Operator, basis: Basis, matrix: _Tridiagonal, max_products: int) -> int:
    """Extend basis and matrix until the wanted pairs have converged; return the products made."""
    vector, size = basis.random(), len(basis.like)
    for product in range(1, min(max_products, size) + 1):
        basis.add(vector)
        image = hessian.finite(vector)
        coefficients, rest = basis.orthogonalize(image)
        beta = float(rest.double().norm())
        matrix.diagonal.append(float(coefficients[-1]))
        invariant = beta <= 50 * torch.finfo(image.dtype).eps * matrix.norm_bound(beta)
        matrix.off_diagonal.append(0.0 if invariant else beta)
        if matrix.is_done(last=product == size):
            break
        if invariant:  # restart in the orthogonal complement
            matrix.start = product
            vector = basis.random()
        else:
            vector = rest / beta
    return product


class _Tridiagonal:
    """The float64 Lanczos matrix, and which of its eigenpairs have converged."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self.start = 0  # index where the iteration last restarted

    def norm_bound(self, least: float) -> float:
        """A lower bound on the operator's norm."""
        return max(least, *map(abs, self.diagonal), *map(abs, self.off_diagonal), 0.0)

    def solve(self, start: int = 0, stop: int | None = None) -> tuple[Array, Array, Array]:
        """Eigenvalues in ascending order, eigenvectors and residuals of the block start:stop."""
        *off, last = self.off_diagonal[start:stop]
        matrix = np.diag(self.diagonal[start:stop]) + np.diag(off, 1) + np.diag(off, -1)
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors, np.abs(last * vectors[-1])

    def converged(self, values: Array, residuals: Array) -> Array:
        """Whether each residual meets the tolerance."""
        return self.wanted.converged(values, residuals, self.norm_bound(0.0))

    def is_done(self, last: bool) -> bool:
        """Whether all wanted pairs have converged and no further one can appear."""
        size = len(self.diagonal)
        if last or size < self.wanted.needed:
            return last
        if size > 64 and size % 4 and self.off_diagonal[-1]:
            return False  # solving every time would cost more than the products
        values, _, residuals = self.solve()
        if not self.converged(values, residuals)[self.wanted.positions(size)].all():
            return False
        if not self._guards_converged(values, residuals):
            return False
        if self.off_diagonal[-1] == 0 and self.start == 0:
            return False  # the complement may hold further vectors of the same eigenvalues
        return self.start == 0 or self._adds_nothing()

    def _guards_converged(self, values: Array, residuals: Array) -> bool:
        """Whether the next pairs inwards have converged too, on the scale of the wanted ones.

        Else one of two eigenvalues close to each other may still be hidden: the random start has
        little of its vector, and the residual of a mixture of both is small.
        """
        guards = self.wanted.guards(len(values))
        scale = np.abs(values[self.wanted.positions(len(values))]).min()
        fine = residuals[guards] <= self.wanted.tolerance * scale
        return len(guards) == self.wanted.ends and bool(fine.all())

    def _adds_nothing(self) -> bool:
        """Whether the last restart found no wanted pair, and its own extremes have converged."""
        if self.start < self.wanted.needed:
            return False
        count, which = self.wanted.count, self.wanted.which
        old, (new, _, residuals) = self.solve(stop=self.start)[0], self.solve(self.start)
        if not self.converged(new, residuals)[[0, -1]].all():
            return False
        slack = self.wanted.tolerance * np.abs(old).max()
        above = new[-1] > old[-count] + slack and which != "smallest"
        below = new[0] < old[count - 1] - slack and which != "largest"
        return not (above or below)

    def result(self, basis: Basis, products: int) -> Eigenpairs:
        """The wanted eigenpairs, with eigenvectors in the operator's space."""
        values, vectors, residuals = self.solve()
        picked = self.wanted.positions(len(values))
        return Eigenpairs(
            values=values[picked],
            vectors=basis.combine(vectors[:, picked]),
            residuals=residuals[picked],
            converged=self.converged(values, residuals)[picked],
            products=products,
            guards=basis.combine(vectors[:, self.wanted.guards(len(values))]),
            norm=self.norm_bound(float(np.abs(values).max())),
        )
