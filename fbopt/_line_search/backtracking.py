"""Backtracking: shorten t until phi(t) <= r + 1e-4 t phi'(0).

Armijo's condition has r = phi(0), the non-monotone one the largest of the last values (Grippo,
Lampariello and Lucidi, "A nonmonotone line search technique for Newton's method", 1986).
"""

from __future__ import annotations

import math

from fbopt._line_search.search import MOST, SUFFICIENT, Phi, Point


def backtrack(phi: Phi, start: Point, first: float, reference: float) -> Point | None:
    """Return the first point that is low enough, None if none of 25 is.

    Args:
        phi: the function; its slopes do not count.
        start: the point at 0, of negative slope.
        first: the first length.
        reference: r, at least ``start.value``.
    """
    t = first
    for _ in range(MOST):
        found = phi(t)
        if found.value <= reference + SUFFICIENT * t * start.slope:  # False for NaN
            return found
        t = _shorter(t, found.value, start)
    return None


def _shorter(t: float, value: float, start: Point) -> float:
    """The minimum of the parabola through what is known, within a tenth and a half of t."""
    if not math.isfinite(value):
        return 0.1 * t
    bend = 2 * (value - start.value - t * start.slope)
    best = -start.slope * t * t / bend if bend > 0 else t
    return min(max(best, 0.1 * t), 0.5 * t)
