"""What line searches take and give back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

# The most points that a search looks at.
MOST = 25
# Armijo's condition asks for this share of the decrease that the slope promises.
SUFFICIENT = 1e-4
# How many values the non-monotone search looks back to.
MEMORY = 10
NAMES = ("strong_wolfe", "armijo", "nonmonotone")


class Point(NamedTuple):
    """A length t with phi(t), the slope phi'(t) and the largest magnitude of the gradient there."""

    length: float
    value: float
    slope: float
    steepness: float = 0.0

    @property
    def is_sound(self) -> bool:
        """Whether value and gradient are numbers."""
        return math.isfinite(self.value) and math.isfinite(self.steepness)

    @property
    def is_finite(self) -> bool:
        """Whether all are numbers."""
        return self.is_sound and math.isfinite(self.slope)


Phi = Callable[[float], Point]


def check_name(name: str | None) -> None:
    """Refuse a line search that there is not."""
    if name is not None and name not in NAMES:
        raise ValueError(f"line_search must be one of {NAMES} or None, got {name!r}")


def remembered(values: Sequence[float], value: float) -> list[float]:
    """Return the values that the non-monotone search looks back to, with one more."""
    return [*values, value][-MEMORY:]
