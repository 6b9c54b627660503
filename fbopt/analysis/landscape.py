"""The loss L(theta + a d + b e) along a line or in a plane, and the flatness of a minimum."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.checks import check
from fbopt.analysis.directions import check_direction, random_direction
from fbopt.analysis.objective import Objective


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid.

    Attributes:
        axes: the coordinates along each direction, float64, one or two arrays.
        losses: (len(axes[0]),) or (len(axes[0]), len(axes[1])), float64; may be infinite or NaN.
        norms: the Euclidean norm of each direction.
    """

    axes: tuple[np.ndarray, ...]
    losses: np.ndarray
    norms: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """All attributes as plain numbers; None for a loss that is not finite."""
        plain = self.losses.astype(object)
        plain[~np.isfinite(self.losses)] = None
        return {
            "axes": [axis.tolist() for axis in self.axes],
            "losses": plain.tolist(),
            "direction_norms": list(self.norms),
        }


def loss_landscape(
    objective: Objective, directions: Sequence[Tensor], axes: Sequence[Sequence[float]]
) -> Landscape:
    """The loss at ``theta + sum_i a_i d_i`` for all combinations of coordinates a_i.

    Each point takes one pass over the chunks, without gradients.

    Args:
        objective: the loss, and the parameters theta.
        directions: one or two vectors d_i; they are not orthogonalised.
        axes: the coordinates a_i along each direction, at least one.

    Raises:
        ValueError: a direction of norm zero; parallel directions; invalid axes.
        RuntimeError: the loss is not deterministic.
    """
    if len(directions) not in (1, 2) or len(axes) != len(directions):
        raise ValueError(
            f"pass one or two directions and as many axes, got {len(directions)} and {len(axes)}"
        )
    norms = tuple(check_direction(d) for d in directions)
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
        parts = (float(axis[i]) * direction for axis, i, direction in terms)
        losses[place] = objective.loss(sum(parts, torch.zeros_like(directions[0])))
    return Landscape(arrays, losses, norms)


FIRST, GROWTH = 2.0**-6, math.sqrt(2.0)  # distances that the outward search tries


@dataclass(frozen=True)
class Flatness:
    """Distances along random filter-normalised directions at which the loss has risen.

    Attributes:
        threshold: the rise of the loss, in units of the loss.
        distances: one for each direction, in filter norms (1: every filter changes by its own
            norm); `limit` where the rise was not reached.
        lengths: the same distances as Euclidean lengths in parameter space.
        limit: the largest distance that was tried.
        reached: the number of directions in which the loss rose by the threshold.
    """

    threshold: float
    distances: tuple[float, ...]
    lengths: tuple[float, ...]
    limit: float
    reached: int

    @property
    def mean(self) -> float:
        """The mean distance; a lower bound if not all directions reached the threshold."""
        return statistics.mean(self.distances)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return statistics.stdev(self.distances) / math.sqrt(len(self.distances))

    def as_json(self) -> dict[str, Any]:
        """All attributes and properties as plain numbers."""
        return vars(self) | {"mean": self.mean, "error": self.error}


def measure_flatness(
    objective: Objective,
    threshold: float = 0.1,
    directions: int = 10,
    *,
    seed: int = 0,
    limit: float = 8.0,
    precision: float = 1e-3,
    vectors: str = "zero",
) -> Flatness:
    """The distance at which ``L(theta + t d) - L(theta)`` first reaches a threshold.

    For each direction t grows from 1/64 by factors of sqrt(2) until the threshold is passed;
    bisection then refines it: about 20 losses. (A rise and fall between two points of the outward
    search goes unnoticed.)

    Args:
        objective: the loss, and the parameters theta.
        threshold: the rise, in units of the loss.
        directions: the number of random directions, at least two.
        seed: of the directions.
        limit: the largest distance to try, in filter norms.
        precision: relative precision of a distance.
        vectors: the entries for one-dimensional parameters, see :func:`random_direction`.

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: the loss is not deterministic.
    """
    check_number("threshold", threshold, above=0)
    check_number("directions", directions, least=2)
    check_number("limit", limit, above=0)
    check_number("precision", precision, above=0)
    check(objective)
    bound = objective.loss() + threshold
    distances, lengths, reached = [], [], 0
    for index in range(directions):
        direction = random_direction(objective, seed, index, vectors=vectors)
        distance = _distance(objective, direction, bound, limit, precision)
        reached += distance is not None
        distances.append(limit if distance is None else distance)
        lengths.append(distances[-1] * float(direction.double().norm()))
    return Flatness(threshold, tuple(distances), tuple(lengths), limit, reached)


def _distance(
    objective: Objective, direction: Tensor, bound: float, limit: float, precision: float
) -> float | None:
    """The distance at which the loss first reaches the bound; None if not within the limit."""

    def reaches(distance: float) -> bool:
        loss = objective.loss(distance * direction)
        return not loss < bound  # NaN counts as risen

    low, high = 0.0, min(FIRST, limit)
    while not reaches(high):
        if high >= limit:
            return None
        low, high = high, min(high * GROWTH, limit)
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high
