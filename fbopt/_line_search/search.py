"""What line searches take and give back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

# The most points that a search looks at.
MOST = 25
# Armijo's condition asks for this share of the decrease that the slope promises.
SUFFICIENT = 1e-4
# How many values the non-monotone search looks back to.
MEMORY = 10
NAMES = ("strong_wolfe", "armijo", "nonmonotone")


class Point(NamedTuple):
    """A length t with the value phi(t) and the slope phi'(t)."""

    length: float
    value: float
    slope: float

    @property
    def is_finite(self) -> bool:
        """Whether value and slope are numbers."""
        return math.isfinite(self.value) and math.isfinite(self.slope)


Phi = Callable[[float], Point]


def check_name(name: str | None) -> None:
    """Refuse a line search that there is not."""
    if name is not None and name not in NAMES:
        raise ValueError(f"line_search must be one of {NAMES} or None, got {name!r}")


def remember(values: list[float], value: float) -> None:
    """Append a value to those that the non-monotone search looks back to."""
    values.append(value)
    del values[:-MEMORY]
