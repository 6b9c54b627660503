"""Eigenpairs that an EigenTracker has found, and what the residuals say about their values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fbopt.analysis.basis import Array
from fbopt.analysis.spectrum import Eigenpairs


@dataclass(frozen=True)
class TrackedEigenpairs(Eigenpairs):
    """The largest eigenvalues at one step of training, and their unit eigenvectors.

    As :class:`Eigenpairs`, but for ``converged``, and more.

    Attributes:
        residuals: ``|H v - lambda v|`` of each pair, by this update's products: the operator has an
            eigenvalue within it of each value.
        errors: estimates of ``|value - eigenvalue|``: the residual, or the least of ``|R_m|^2/gap``
            over the first m pairs, this one included, with their residuals R_m and the gap to the
            next Ritz value (Mathias, SIAM J. Matrix Anal. Appl. 19, 1998). The gap is an estimate.
        converged: whether each error is below the tolerance times the absolute value. It says that
            a pair is an eigenpair, not that no other eigenvalue is larger.
        following: the next eigenvalue inwards, by its latest products, of this update or of earlier
            ones: -inf if none is known.
    """

    errors: Array = field(default_factory=lambda: np.zeros(0))
    following: float = -math.inf


def estimate(values: Array, residuals: Array, following: float) -> Array:
    """The errors of Ritz values in descending order, as :class:`TrackedEigenpairs` defines them;
    of the last ones by the residual alone where the `following` value is -inf, unknown.
    """
    squares = np.cumsum(residuals**2)
    inner = np.append(values[1:], following if following > -math.inf else math.inf)
    gaps = values - inner
    with np.errstate(divide="ignore", over="ignore"):
        bounds = np.where(gaps > 0, squares / np.maximum(gaps, 0), np.inf)
    return np.minimum(residuals, np.minimum.accumulate(bounds[::-1])[::-1])
