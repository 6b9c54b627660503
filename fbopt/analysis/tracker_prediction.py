"""Where eigenvectors will be after the next step: X(t+1) ~ a X(t) + b X(t-1), with the a and b that
would have been best one step before. (2, -1) goes on along a smooth path, (0, 1) follows an
oscillation of period two, as at the edge of stability.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RIDGE = 1e-3  # pulls (a, b) towards (1, 0): vectors are known to about the root of a tolerance


def aligned(rows: Tensor, to: Tensor) -> Tensor:
    """Rotate orthonormal rows within their span to where they are nearest to others (Procrustes),
    as eigenvectors of eigenvalues close to each other are known as a space alone.
    """
    left, _, right = np.linalg.svd((to @ rows.T).double().cpu().numpy(), full_matrices=False)
    return torch.from_numpy(np.ascontiguousarray(left @ right)).to(rows) @ rows


class Prediction:
    """The eigenvectors of the last two steps, and how the next ones follow from them.

    Attributes:
        rows: X(t), (m, P).
        before: X(t-1) aligned to them; X(t) again after the first step.
        weights: a and b.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.before, self.weights = rows, rows, (1.0, 0.0)

    def next(self) -> Tensor:
        """The prediction: rows of about unit length."""
        a, b = self.weights
        return a * self.rows + b * self.before

    def after(self, rows: Tensor, count: int) -> Prediction:
        """The prediction after a further step, by the path of the first `count` rows.

        Of more rows than before, the path begins anew.
        """
        found = Prediction(rows)
        if len(rows) <= len(self.rows):
            last, before = (aligned(old[: len(rows)], rows) for old in (self.rows, self.before))
            found.weights = _fit(rows[:count], last[:count], before[:count])
            found.before = last
        return found


def _fit(now: Tensor, last: Tensor, before: Tensor) -> tuple[float, float]:
    """The (a, b) of the least ``|now - a last - b before|^2 + ridge |(a, b) - (1, 0)|^2``."""
    pair = torch.stack([last, before]).double().flatten(1)
    gram, right = (pair @ pair.T).cpu().numpy(), (pair @ now.double().flatten()).cpu().numpy()
    ridge = RIDGE * len(now)
    found = np.linalg.solve(gram + ridge * np.eye(2), right + ridge * np.array([1.0, 0.0]))
    return float(found[0]), float(found[1])
