"""Extreme eigenpairs from given start vectors: Rayleigh-Ritz in a space that residuals extend.

In a space with orthonormal basis B the eigenpairs (lambda, y) of B^T H B give the Ritz pairs
(lambda, B y), of residuals ``H B y - lambda B y``. The largest residual of a wanted pair becomes
the next basis vector: Davidson's method without a preconditioner. From one vector, that is Lanczos.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fbopt._distributed import checksum
from fbopt._random import mix
from fbopt.analysis.basis import Array, Basis
from fbopt.analysis.operator import Operator
from fbopt.analysis.spectrum import Eigenpairs, Wanted

MIXED = 0.03, 0.1  # least and largest length of the random vector added to each start vector
RENEWED, SEARCH = 20, 10  # calls between two searches from a random vector, and products for one


class RitzSpace:
    """A basis B, the products H B, and the Ritz pairs of the wanted eigenvalues."""

    def __init__(self, hessian: Operator, wanted: Wanted, like: Tensor, seed: int) -> None:
        self.hessian, self.wanted = hessian, wanted
        self.basis, self.images = Basis(like, seed), Basis(like, seed)
        self.matrix = np.zeros((0, 0))

    @property
    def size(self) -> int:
        """The number of basis vectors, and of products."""
        return self.basis.length

    def extend(self, vector: Tensor) -> Tensor:
        """Add a vector, or a random one where it is in the space; return its product."""
        _, rest = self.basis.orthogonalize(vector)
        norm = float(rest.norm())
        if norm <= 1e3 * torch.finfo(rest.dtype).eps * float(vector.norm()):
            unit = self.basis.random()
        else:  # once more, as rounding is relative to what the first removed
            unit = self.basis.orthogonalize(rest / norm)[1]
            unit /= unit.norm()
        image = self.hessian.finite(unit)
        self.basis.add(unit)
        self.images.add(image)
        column = self.basis.orthogonalize(image)[0]
        self.matrix = np.pad(self.matrix, (0, 1))
        self.matrix[-1, :] = self.matrix[:, -1] = column
        return image

    def solve(self) -> tuple[Array, Array]:
        """Ritz values in ascending order, and the vectors' coefficients in columns."""
        values, vectors = np.linalg.eigh(self.matrix)
        return values, vectors

    def residuals(self, values: Array, coefficients: Array) -> Tensor:
        """``H x - lambda x`` of Ritz pairs, as rows."""
        scaled = self.basis.combine(coefficients * values)
        return self.images.combine(coefficients) - scaled


def eigenpairs_from(
    start: Tensor, hessian: Operator, wanted: Wanted, max_products: int, seed: int, age: int = 0
) -> Eigenpairs:
    """Wanted eigenpairs of the operator; `start` has at least one row, `age` as in Eigenpairs."""
    space = RitzSpace(hessian, wanted, start[0], mix(seed, abs(checksum([start])[0])))
    for vector in _mixed(start, space, max_products):
        space.extend(vector)
    if age > RENEWED and min(max_products, start.shape[1]) - space.size >= SEARCH:
        age = 0
        _search(space)
    while True:
        values, coefficients = space.solve()
        chosen = wanted.positions(space.size)
        residuals = space.residuals(values[chosen], coefficients[:, chosen])
        norms = residuals.double().norm(dim=1).cpu().numpy()
        norm = float(np.abs(values).max())
        converged = wanted.converged(values[chosen], norms, norm)
        if converged.all() or space.size >= min(max_products, start.shape[1]):
            break
        worst = np.argmax(
            np.where(converged, 0, norms / np.maximum(np.abs(values[chosen]), 1e-300))
        )
        space.extend(residuals[int(worst)])
    return Eigenpairs(
        values=values[chosen],
        vectors=space.basis.combine(coefficients[:, chosen]),
        residuals=norms,
        converged=converged,
        products=space.size,
        guards=space.basis.combine(coefficients[:, wanted.guards(space.size)]),
        norm=norm,
        age=age,
    )


def _search(space: RitzSpace) -> None:
    """Extend by Lanczos iterations from a random vector: what no start vector shows is found."""
    vector = space.basis.random()
    for _ in range(SEARCH):
        vector = space.extend(vector)


def _mixed(start: Tensor, space: RitzSpace, max_products: int) -> list[Tensor]:
    """Unit start vectors with random ones mixed in, then random ones: a guard at each end."""
    wanted, size = space.wanted, start.shape[1]
    total = max(len(start), wanted.needed + wanted.ends)
    length = min(max(10 * wanted.tolerance, MIXED[0]), MIXED[1])
    draws = [space.basis.random() for _ in range(total)]
    rows = [row / row.norm() + length * z for row, z in zip(start, draws, strict=False)]
    return [*rows, *draws[len(rows) :]][: min(max_products, size)]
