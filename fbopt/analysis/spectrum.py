"""Which eigenpairs of a symmetric operator are wanted, and those that were found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fbopt.analysis.basis import Array

ENDS = ("largest", "smallest", "both")


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenvalues and unit eigenvectors of a symmetric operator.

    Attributes:
        values: (k,) float64, from the end of the spectrum inwards; for both ends (2k,), the largest
            first, then the smallest.
        vectors: (k, P), in the order of `values`.
        residuals: ``|H v - lambda v|`` of each pair, computed by one more product if the pairs were
            verified, else by the iteration. The operator has an eigenvalue within the residual of
            each value.
        converged: whether each pair's residual, as given here, met the tolerance.
        products: the number of products with the operator.
        guards: (0, 1 or 2, P): at each end the best approximation to the next eigenvector inwards,
            for the ``start`` of a later call.
        norm: a lower bound on the operator's norm.
        age: the calls with ``start`` since the last search from a random vector.
    """

    values: Array
    vectors: Tensor
    residuals: Array
    converged: Array
    products: int
    guards: Tensor
    norm: float
    age: int = 0


@dataclass(frozen=True)
class Wanted:
    """The eigenpairs that are asked for; fields as the arguments of :func:`eigenpairs`."""

    count: int
    which: str
    tolerance: float

    @property
    def needed(self) -> int:
        """How many pairs these are."""
        return self.count * self.ends

    @property
    def ends(self) -> int:
        """How many ends of the spectrum."""
        return 2 if self.which == "both" else 1

    def positions(self, size: int) -> Array:
        """The positions of the wanted eigenvalues among `size` in ascending order."""
        largest, smallest = np.arange(size)[::-1][: self.count], np.arange(size)[: self.count]
        ends = {"largest": [largest], "smallest": [smallest], "both": [largest, smallest]}
        return np.concatenate(ends[self.which])

    def guards(self, size: int) -> Array:
        """The positions of the next eigenvalues inwards, as far as there are any."""
        wider = Wanted(self.count + 1, self.which, self.tolerance)
        if size < wider.needed:
            return np.arange(0)
        return wider.positions(size)[self.count :: self.count + 1]

    def converged(self, values: Array, residuals: Array, norm: float = 0.0) -> Array:
        """Whether each residual meets the tolerance; `norm` bounds the operator's from below."""
        scale = np.maximum(np.abs(values), 1e-3 * max(norm, np.abs(values).max()))
        return np.asarray(residuals <= self.tolerance * scale)
