"""The loss along a line or in a plane of parameter space, L(theta + a d + b e) on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fbopt.analysis.checks import check
from fbopt.analysis.directions import check_direction
from fbopt.analysis.objective import Objective


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid.

    Attributes:
        axes: the coordinates along each direction, float64, one or two arrays.
        losses: (len(axes[0]),) or (len(axes[0]), len(axes[1])), float64; infinite or NaN where the
            loss is.
        norms: the length of each direction in parameter space.
    """

    axes: tuple[np.ndarray, ...]
    losses: np.ndarray
    norms: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain numbers; None for a loss that is not finite."""
        plain = np.where(np.isfinite(self.losses), self.losses, None)
        return {
            "axes": [axis.tolist() for axis in self.axes],
            "losses": plain.tolist(),
            "direction_norms": list(self.norms),
        }


def loss_landscape(
    objective: Objective, directions: Sequence[Tensor], axes: Sequence[Sequence[float]]
) -> Landscape:
    """The loss at ``theta + sum_i a_i d_i`` for all combinations of coordinates a_i.

    One pass over the chunks, without gradients, for each point.

    Args:
        objective: the loss, and theta.
        directions: one or two vectors; not orthogonalised.
        axes: the coordinates along each, at least one.

    Raises:
        ValueError: a direction of norm zero; two that are parallel; axes that do not fit.
        RuntimeError: the loss is not deterministic.
    """
    if len(directions) not in (1, 2) or len(axes) != len(directions):
        raise ValueError(
            f"pass one or two directions and as many axes, got {len(directions)} and {len(axes)}"
        )
    for direction in directions:
        check_direction(direction)
    norms = tuple(float(d.double().norm()) for d in directions)
    if len(directions) == 2:
        cosine = float((directions[0] / norms[0]).double() @ (directions[1] / norms[1]).double())
        if abs(cosine) > 1 - 1e-6:
            raise ValueError("the two directions are parallel: they span no plane")
    arrays = tuple(np.asarray(axis, dtype=np.float64) for axis in axes)
    if any(a.ndim != 1 or a.size == 0 or not np.isfinite(a).all() for a in arrays):
        raise ValueError("each of axes must be a sequence of finite numbers, at least one")
    check(objective)
    losses = np.empty([len(axis) for axis in arrays])
    for place in np.ndindex(losses.shape):
        terms = zip(arrays, place, directions, strict=True)
        shift = sum(float(axis[i]) * direction for axis, i, direction in terms)
        losses[place] = objective.loss(shift)
    return Landscape(arrays, losses, norms)
