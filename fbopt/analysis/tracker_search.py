"""A search for eigenvalues that no tracked vector shows: Lanczos iterations from a random vector,
orthogonal to the tracked ones, of which a step of training makes one.

The operator moves meanwhile, so that what the chain of vectors says is a hint: a product tells.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fbopt.analysis.basis import Array, Basis

LENGTH = 8  # products from one random vector


class Search:
    """A chain of orthonormal vectors q, and T = q.(H q), each column as of its own step.

    Args:
        like: a vector of the operator's space.
        seed: of the random vector.

    Attributes:
        ahead: the vector of the next product.
    """

    def __init__(self, like: Tensor, seed: int) -> None:
        self.basis, self.matrix = Basis(like, seed), np.zeros((0, 0))
        self.ahead = self.basis.random()

    @property
    def is_over(self) -> bool:
        """Whether another random vector is due."""
        return self.basis.length >= min(LENGTH, len(self.basis.like))

    @property
    def value(self) -> float:
        """The largest eigenvalue that the chain shows; -inf before the first product."""
        return float(np.linalg.eigvalsh(self.matrix)[-1]) if self.basis.length else -np.inf

    def best(self) -> Tensor:
        """The vector that belongs to it."""
        return self.basis.combine(np.linalg.eigh(self.matrix)[1][:, -1:])[0]

    def follow(self, unit: Tensor, image: Tensor) -> None:
        """Add the vector of a product, and its image."""
        rest = self.basis.orthogonalize(unit)[1]
        self.basis.add(rest / rest.norm().clamp_min(1e-30))
        column, self.ahead = self.basis.orthogonalize(image)
        self.matrix = np.pad(self.matrix, (0, 1))
        self.matrix[-1, :] = self.matrix[:, -1] = column

    def rows(self) -> Tensor:
        """The chain, (length, P)."""
        if not self.basis.length:
            return self.basis.like.new_zeros(0, len(self.basis.like))
        return self.basis.combine(np.eye(self.basis.length))

    def restore(self, rows: Tensor, matrix: Array, ahead: Tensor) -> None:
        """Go back to where these were taken."""
        for row in rows:
            self.basis.add(row)
        self.matrix, self.ahead = matrix.copy(), ahead.clone()
