"""Extreme eigenvalues and eigenvectors of a symmetric operator by Lanczos iterations.

Every new vector is orthogonalised twice against all earlier ones (full reorthogonalisation; Golub
and Van Loan, Matrix Computations, section 10.3), so that no eigenpair appears twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.hessian import Hessian

ENDS = ("largest", "smallest", "both")
Array = npt.NDArray[Any]
BLOCK = 16  # basis vectors per allocation


class Basis:
    """Orthonormal vectors, stored in blocks that are allocated as needed."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self.like, self.length = like, 0
        self.blocks: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def _rows(self) -> list[Tensor]:
        """The used rows of every block."""
        return [block[: self.length - BLOCK * i] for i, block in enumerate(self.blocks)]

    def add(self, vector: Tensor) -> None:
        """Add a unit vector orthogonal to the others."""
        if self.length == BLOCK * len(self.blocks):
            self.blocks.append(self.like.new_empty(BLOCK, len(self.like)))
        self.blocks[-1][self.length % BLOCK] = vector
        self.length += 1

    def orthogonalize(self, vector: Tensor) -> tuple[Array, Tensor]:
        """Return a vector's components along the basis (float64) and the remainder."""
        rest, total = vector.clone(), np.zeros(self.length)
        for _ in range(2):  # rounding in the first is relative to the components it removes
            components = [rows @ rest for rows in self._rows()]
            for rows, part in zip(self._rows(), components, strict=True):
                rest -= part @ rows
            if components:
                total += torch.cat(components).double().cpu().numpy()
        return total, rest

    def random(self) -> Tensor:
        """Draw a random unit vector orthogonal to the basis."""
        draw = torch.randn(len(self.like), dtype=torch.float64, generator=self.generator)
        _, rest = self.orthogonalize((draw / draw.norm()).to(self.like))
        _, rest = self.orthogonalize(rest / rest.norm())
        return rest.div_(rest.norm())

    def combine(self, coefficients: Array) -> Tensor:
        """Linear combinations of the vectors, by the columns of (length, k), as rows of (k, P)."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self.like)
        parts = torch.split(weights, [len(rows) for rows in self._rows()], dim=1)
        products = (w @ rows for w, rows in zip(parts, self._rows(), strict=True))
        return sum(products, weights.new_zeros(()))


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenvalues and unit eigenvectors of a symmetric operator.

    Attributes:
        values: (k,) float64, from the end of the spectrum inwards; for both ends (2k,), the largest
            first, then the smallest.
        vectors: (k, P), in the order of `values`.
        residuals: ``|H v - lambda v|`` of each pair, computed by one more product if the pairs were
            verified, else estimated by the iteration. The operator has an eigenvalue within the
            residual of each value.
        converged: whether each pair's residual, as given here, met the tolerance.
        products: the number of products with the operator.
    """

    values: Array
    vectors: Tensor
    residuals: Array
    converged: Array
    products: int


def eigenpairs(
    hessian: Hessian,
    count: int = 5,
    which: str = "largest",
    *,
    tolerance: float | None = None,
    max_products: int = 200,
    seed: int = 0,
    verify: bool = True,
) -> Eigenpairs:
    """Extreme eigenvalues of the full-batch Hessian and their eigenvectors.

    Eigenvalues are ordered with their sign: the smallest are the most negative. Memory: one vector
    per product. Further eigenvectors of a multiple eigenvalue are found only once the Krylov space
    is exhausted.

    Args:
        hessian: the operator, exact or by finite differences.
        count: the number of eigenvalues at each end.
        which: ``"largest"``, ``"smallest"`` or ``"both"``.
        tolerance: a pair has converged if its residual is below this fraction of its absolute
            eigenvalue (for eigenvalues near zero, of a thousandth of the largest). Default: 1e-6
            for float64 and exact products, else 1e-3.
        max_products: stop after so many products; the result says which pairs have converged.
        seed: of the random start.
        verify: compute the residuals by one more product for each pair.

    Raises:
        TypeError, ValueError: an invalid argument; products that are not finite.
    """
    objective = hessian.objective
    if tolerance is None:
        fine = objective.epsilon < 1e-12 and hessian.method == "exact"
        tolerance = 1e-6 if fine else 1e-3
    like = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    _check(len(like), count, which, tolerance, max_products)
    basis, matrix = Basis(like, seed), _Tridiagonal(count, which, tolerance)
    found = matrix.result(basis, _iterate(hessian, basis, matrix, max_products))
    if not verify:
        return found
    residuals = np.array(
        [
            float((hessian(vector) - float(value) * vector).double().norm())
            for value, vector in zip(found.values, found.vectors, strict=True)
        ]
    )
    return replace(
        found,
        residuals=residuals,
        converged=matrix.converged(found.values, residuals),
        products=found.products + len(residuals),
    )


def _iterate(hessian: Hessian, basis: Basis, matrix: _Tridiagonal, max_products: int) -> int:
    """Extend basis and matrix until the wanted pairs have converged; return the products made."""
    vector, size = basis.random(), len(basis.like)
    for product in range(1, min(max_products, size) + 1):
        basis.add(vector)
        image = hessian(vector)
        if not torch.isfinite(image).all():
            raise ValueError(
                f"product {product} with the operator is infinite or undefined: with finite "
                "differences try a smaller radius"
            )
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

    def __init__(self, count: int, which: str, tolerance: float) -> None:
        self.count, self.which, self.tolerance = count, which, tolerance
        self.needed = 2 * count if which == "both" else count
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

    def wanted(self, size: int) -> Array:
        """The positions of the wanted eigenvalues among `size` in ascending order."""
        order = np.arange(size)
        largest, smallest = order[::-1][: self.count], order[: self.count]
        ends = {"largest": [largest], "smallest": [smallest], "both": [largest, smallest]}
        return np.concatenate(ends[self.which])

    def converged(self, values: Array, residuals: Array) -> Array:
        """Whether each residual meets the tolerance."""
        scale = np.maximum(np.abs(values), 1e-3 * self.norm_bound(np.abs(values).max()))
        return np.asarray(residuals <= self.tolerance * scale)

    def is_done(self, last: bool) -> bool:
        """Whether all wanted pairs have converged and no further one can appear."""
        size = len(self.diagonal)
        if last or size < self.needed:
            return last
        if size > 64 and size % 4 and self.off_diagonal[-1]:
            return False  # solving every time would cost more than the products
        values, _, residuals = self.solve()
        if not self.converged(values, residuals)[self.wanted(size)].all():
            return False
        if self.off_diagonal[-1] == 0 and self.start == 0:
            return False  # the complement may hold further vectors of the same eigenvalues
        return self.start == 0 or self._adds_nothing()

    def _adds_nothing(self) -> bool:
        """Whether the last restart found no wanted pair, and its own extremes have converged."""
        if self.start < self.needed:
            return False
        old, (new, _, residuals) = self.solve(stop=self.start)[0], self.solve(self.start)
        if not self.converged(new, residuals)[[0, -1]].all():
            return False
        slack = self.tolerance * np.abs(old).max()
        above = new[-1] > old[-self.count] + slack and self.which != "smallest"
        below = new[0] < old[self.count - 1] - slack and self.which != "largest"
        return not (above or below)

    def result(self, basis: Basis, products: int) -> Eigenpairs:
        """The wanted eigenpairs, with eigenvectors in the operator's space."""
        values, vectors, residuals = self.solve()
        picked = self.wanted(len(values))
        return Eigenpairs(
            values=values[picked],
            vectors=basis.combine(vectors[:, picked]),
            residuals=residuals[picked],
            converged=self.converged(values, residuals)[picked],
            products=products,
        )


def _check(size: int, count: int, which: str, tolerance: float, max_products: int) -> None:
    if which not in ENDS:
        raise ValueError(f"which must be one of {ENDS}, got {which!r}")
    check_number("count", count, least=1)
    check_number("tolerance", tolerance, above=0)
    needed = 2 * count if which == "both" else count
    if needed > size:
        raise ValueError(f"count asks for {needed} eigenvalues, but there are {size}")
    if max_products < needed:
        raise ValueError(f"max_products is {max_products}: {needed} eigenvalues need as many")
