"""Backtracking: shorten t until phi(t) <= r + 1e-4 t phi'(0).

Armijo's condition has r = phi(0), the non-monotone one the largest of the last values (Grippo,
Lampariello and Lucidi, "A nonmonotone line search technique for Newton's method", 1986).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fbopt._line_search.search import MOST, SUFFICIENT, Phi, Point


def backtrack(
    phi: Phi,
    start: Point,
    first: float,
    reference: float,
    look: Callable[[float], float] | None = None,
) -> Point | None:
    """Return the first point that is low enough, None if none of 25 is.

    Args:
        phi: the function; points that are not finite count as too far.
        start: the point at 0, of negative slope.
        first: the first length.
        reference: r, at least ``start.value``.
        look: the value of phi alone, where it costs less: phi itself only where that is low enough.
    """
    t = first
    for _ in range(MOST):
        bound = reference + SUFFICIENT * t * start.slope
        value = bound if look is None else look(t)
        if -math.inf < value <= bound:  # False for NaN
            found = phi(t)
            if found.is_finite and found.value <= bound:
                return found
            value = found.value if found.is_finite else math.nan
        t = _shorter(t, value, start)
    return None


def _shorter(t: float, value: float, start: Point) -> float:
    """The minimum of the parabola through what is known, within a tenth and a half of t."""
    if not math.isfinite(value):
        return 0.1 * t
    bend = 2 * (value - start.value - t * start.slope)
    best = -start.slope * t * t / bend if bend > 0 else t
    return min(max(best, 0.1 * t), 0.5 * t)
