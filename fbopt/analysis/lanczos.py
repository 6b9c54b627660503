"""Extreme eigenvalues and eigenvectors of a symmetric operator by Lanczos iterations.

Every new vector is orthogonalised, twice, against all before it (Golub and Van Loan, Matrix
Computations, section 10.3), so that none is found twice; the tridiagonal matrix is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.hessian import Hessian

BLOCK = 16  # vectors in a piece of memory


class Basis:
    """Orthonormal vectors, in blocks of memory that are added as they are needed."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self.like, self.length = like, 0
        self.blocks: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def _rows(self) -> list[Tensor]:
        """The blocks' rows that are in use."""
        left = [self.length - BLOCK * i for i in range(len(self.blocks))]
        return [b[: min(BLOCK, n)] for b, n in zip(self.blocks, left, strict=True)]

    def add(self, vector: Tensor) -> None:
        """Add a unit vector that is orthogonal to the others."""
        if self.length == BLOCK * len(self.blocks):
            self.blocks.append(self.like.new_empty(BLOCK, len(self.like)))
        self.blocks[-1][self.length % BLOCK] = vector
        self.length += 1

    def orthogonalize(self, vector: Tensor) -> tuple[np.ndarray, Tensor]:
        """The components of a vector along the basis (float64), and what is left of it."""
        rest, total = vector.clone(), np.zeros(self.length)
        for _ in range(2):  # the first leaves an error in proportion to what it takes away
            components = [rows @ rest for rows in self._rows()]
            for rows, part in zip(self._rows(), components, strict=True):
                rest -= part @ rows
            if components:
                total += torch.cat(components).double().cpu().numpy()
        return total, rest

    def random(self) -> Tensor:
        """A random unit vector orthogonal to the basis."""
        draw = torch.randn(len(self.like), dtype=torch.float64, generator=self.generator)
        _, rest = self.orthogonalize((draw / draw.norm()).to(self.like))
        _, rest = self.orthogonalize(rest / rest.norm())
        return rest / rest.norm()

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """The combinations with the columns of (length, k), as the rows of (k, P)."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self.like)
        parts = weights.split([len(rows) for rows in self._rows()], dim=1)
        return sum(w @ rows for w, rows in zip(parts, self._rows(), strict=True))


ENDS = ("largest", "smallest", "both")


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues, the largest first (for the lower end the smallest), and unit eigenvectors.

    Attributes:
        values: (k,) float64; for both ends (2k,), first the largest, then the smallest.
        vectors: (k, P), in the order of `values`.
        residuals: ``|H v - lambda v|`` of each pair, from a product of its own where the pairs were
            verified, else as the iteration estimates it. An eigenvalue lies within the residual.
        converged: whether the iteration met its tolerance for each.
        products: products with the operator that were made.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    converged: np.ndarray
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
    """The extreme eigenvalues of the full-batch Hessian and their vectors.

    "Largest" is meant with the sign: the smallest are the most negative ones. Memory: a vector per
    product. Of an eigenvalue with several vectors the first is found at once, the others only where
    the Krylov space is exhausted.

    Args:
        hessian: the operator, exact or by finite differences.
        count: eigenvalues at each end.
        which: ``"largest"``, ``"smallest"`` or ``"both"``.
        tolerance: a pair has converged if its residual is below this share of its eigenvalue (of a
            thousandth of the largest, for those that are nearly zero). Default: 1e-6 for float64
            and exact products, else 1e-3.
        max_products: when to stop without convergence, which the result then says.
        seed: of the random start.
        verify: find the residuals with one more product for each pair.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    objective = hessian.objective
    if tolerance is None:
        fine = objective.epsilon < 1e-12 and hessian.method == "exact"
        tolerance = 1e-6 if fine else 1e-3
    found = lanczos(
        hessian,
        torch.zeros(objective.size, dtype=objective.dtype, device=objective.params[0].device),
        count,
        which,
        tolerance=tolerance,
        max_products=max_products,
        seed=seed,
    )
    return _verified(hessian, found) if verify else found


def lanczos(
    operator: Callable[[Tensor], Tensor],
    like: Tensor,
    count: int,
    which: str = "largest",
    *,
    tolerance: float = 1e-6,
    max_products: int = 200,
    seed: int = 0,
) -> Eigenpairs:
    """:func:`eigenpairs` of any symmetric operator on vectors of the shape, dtype and device of
    `like`.
    """
    _check(like, count, which, tolerance, max_products)
    basis = Basis(like, seed)
    chain = _Chain(count, which, tolerance)
    vector = basis.random()
    for product in range(1, min(max_products, len(like)) + 1):
        basis.add(vector)
        image = operator(vector).to(like.dtype)
        if not torch.isfinite(image).all():
            raise ValueError(
                f"product {product} with the operator is infinite or undefined: with finite "
                "differences try a smaller radius"
            )
        coefficients, rest = basis.orthogonalize(image)
        beta = float(rest.double().norm())
        chain.diagonal.append(float(coefficients[-1]))
        broken = beta <= 50 * torch.finfo(like.dtype).eps * chain.size(beta)
        chain.off_diagonal.append(0.0 if broken else beta)
        if chain.done(last=product == len(like)):
            break
        if broken:  # the space is invariant: go on in what is left
            chain.begin_anew()
            vector = basis.random()
        else:
            vector = rest / beta
    return chain.result(basis, product)


@dataclass
class _Chain:
    """The tridiagonal matrix, and which of its eigenpairs have converged."""

    count: int
    which: str
    tolerance: float
    diagonal: list[float] = field(default_factory=list)
    off_diagonal: list[float] = field(default_factory=list)
    start: int = 0  # of the last chain, after a breakdown

    def size(self, least: float) -> float:
        """A bound from below on the operator's norm, as far as it is seen."""
        return max(least, *map(abs, self.diagonal), *map(abs, self.off_diagonal), 0.0)

    def begin_anew(self) -> None:
        self.start = len(self.diagonal)

    def solve(self, start: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues in ascending order, eigenvectors, residuals of the matrix from `start` on."""
        off = self.off_diagonal[start:-1]
        matrix = np.diag(self.diagonal[start:]) + np.diag(off, 1) + np.diag(off, -1)
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors, np.abs(self.off_diagonal[-1] * vectors[-1])

    def wanted(self, size: int) -> np.ndarray:
        """The positions of the wanted eigenvalues among `size` in ascending order."""
        order = np.arange(size)
        largest, smallest = order[::-1][: self.count], order[: self.count]
        ends = {"largest": [largest], "smallest": [smallest], "both": [largest, smallest]}
        return np.concatenate(ends[self.which])

    def converged(self, values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        scale = np.maximum(np.abs(values), 1e-3 * np.abs(values).max())
        return residuals <= self.tolerance * scale

    def done(self, last: bool) -> bool:
        """Whether all wanted pairs have converged and nothing hidden can be left."""
        size = len(self.diagonal)
        if last or size < (2 if self.which == "both" else 1) * self.count:
            return last
        if size > 64 and size % 4 and self.off_diagonal[-1]:
            return False
        values, _, residuals = self.solve()
        picked = self.wanted(size)
        if not self.converged(values, residuals)[picked].all():
            return False
        if self.off_diagonal[-1] == 0 and self.start == 0:
            return False  # other vectors of the same eigenvalues may lie outside of this space
        return self.start == 0 or self._adds_nothing()

    def _adds_nothing(self) -> bool:
        """Whether no wanted pair comes from the last chain, whose own extremes have converged."""
        before = _Chain(
            self.count, self.which, self.tolerance,
            self.diagonal[: self.start], self.off_diagonal[: self.start],
        )  # fmt: skip
        if len(before.diagonal) < len(self.wanted(len(self.diagonal))):
            return False
        old, new = before.solve()[0], self.solve(self.start)
        if not self.converged(new[0], new[2])[[0, -1]].all():
            return False
        slack = self.tolerance * np.abs(old).max()
        above = new[0][-1] > old[-self.count] + slack and self.which != "smallest"
        below = new[0][0] < old[self.count - 1] - slack and self.which != "largest"
        return not (above or below)

    def result(self, basis: Basis, products: int) -> Eigenpairs:
        values, vectors, residuals = self.solve()
        picked = self.wanted(len(values))
        return Eigenpairs(
            values=values[picked],
            vectors=basis.combine(vectors[:, picked]),
            residuals=residuals[picked],
            converged=self.converged(values, residuals)[picked],
            products=products,
        )


def _verified(hessian: Hessian, found: Eigenpairs) -> Eigenpairs:
    """The same pairs with residuals that a product with each vector gives."""
    residuals = [
        float((hessian(vector) - float(value) * vector).double().norm())
        for value, vector in zip(found.values, found.vectors, strict=True)
    ]
    return Eigenpairs(
        found.values,
        found.vectors,
        np.array(residuals),
        found.converged,
        found.products + len(residuals),
    )


def _check(like: Tensor, count: int, which: str, tolerance: float, max_products: int) -> None:
    if which not in ENDS:
        raise ValueError(f"which must be one of {ENDS}, got {which!r}")
    check_number("count", count, least=1)
    check_number("tolerance", tolerance, above=0)
    needed = 2 * count if which == "both" else count
    if needed > len(like):
        raise ValueError(f"count asks for {needed} eigenvalues, but there are {len(like)}")
    if max_products < needed:
        raise ValueError(f"max_products is {max_products}: {needed} eigenvalues need as many")
