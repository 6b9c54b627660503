"""The loss along a line or in a plane of parameter space, L(theta + a d + b e) on a grid."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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


FIRST, GROWTH = 2.0**-6, math.sqrt(2.0)  # of the search outwards


@dataclass(frozen=True)
class Flatness:
    """Distances along random filter-normalised directions.

    Attributes:
        threshold: how far the loss rose, in units of the loss.
        distances: one for each direction, in units of the direction (1: every filter changes by its
            own norm); `limit` where the loss had not risen so far by then.
        lengths: the same as lengths in parameter space.
        limit: how far was looked.
        reached: in how many directions the loss rose by the threshold.
    """

    threshold: float
    distances: tuple[float, ...]
    lengths: tuple[float, ...]
    limit: float
    reached: int

    @property
    def mean(self) -> float:
        """Of the distances; a bound from below where not all were reached."""
        return statistics.mean(self.distances)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return statistics.stdev(self.distances) / math.sqrt(len(self.distances))

    def as_json(self) -> dict[str, Any]:
        """All of it as plain numbers."""
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

    For each direction t grows by sqrt(2) from 1/64 until the threshold is passed, and the interval
    is then halved: about 20 losses. (Between two points of the search outwards the loss may rise
    and fall again unseen.)

    Args:
        objective: the loss, and theta.
        threshold: the rise, in units of the loss.
        directions: their number, at least two; see :func:`random_direction` for `seed`, `vectors`.
        seed: of the directions.
        limit: where to give up.
        precision: relative precision of a distance.
        vectors: what becomes of biases and BatchNorm's parameters.

    Raises:
        TypeError, ValueError: an argument that does not fit.
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
    """Where the loss first reaches the bound, to a relative precision; None: not by the limit."""

    def reaches(distance: float) -> bool:
        loss = objective.loss(distance * direction)
        return not loss < bound  # NaN has risen too

    low, high = 0.0, min(FIRST, limit)
    while not reaches(high):
        if high >= limit:
            return None
        low, high = high, min(high * GROWTH, limit)
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high
