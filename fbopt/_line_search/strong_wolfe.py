"""A search for the strong Wolfe conditions, by cubic interpolation.

    phi(t) <= phi(0) + 1e-4 t phi'(0)        abs(phi'(t)) <= 0.9 abs(phi'(0))

Nocedal and Wright, "Numerical Optimization" (2006), algorithms 3.5 and 3.6.
"""

from __future__ import annotations

import math

from fbopt._line_search.search import MOST, SUFFICIENT, Phi, Point

CURVATURE = 0.9
# How far a trial may go beyond the last one, and how near to an end of the bracket.
FURTHEST, MARGIN = 10.0, 0.1


def strong_wolfe(
    phi: Phi, start: Point, first: float, *, longest: float = math.inf, narrowest: float = 0.0
) -> Point | None:
    """Return a point that satisfies both conditions; None if no point has a lower value.

    Where 25 points, the longest length or the narrowest bracket end the search, the point with the
    lowest value that satisfies the first condition alone.

    Args:
        phi: the function; points that are not finite count as too far.
        start: the point at 0, of negative slope.
        first: the first length.
        longest: the bound of lengths.
        narrowest: the length of a bracket that is searched no further.
    """
    before, now, left = start, phi(min(first, longest)), MOST - 1
    while True:
        if _is_too_far(now, start) or (before is not start and now.value >= before.value):
            return _zoom(phi, start, before, now, left, narrowest)
        if _is_flat(now, start) or now.length >= longest or left == 0:
            return now
        if now.slope >= 0:
            return _zoom(phi, start, now, before, left, narrowest)
        least = now.length + 0.01 * (now.length - before.length)
        t = _cubic_minimum(before, now, least, FURTHEST * now.length)
        before, now, left = now, phi(min(t, longest)), left - 1


def _is_too_far(point: Point, start: Point) -> bool:
    decrease = SUFFICIENT * point.length * start.slope
    return not point.is_finite or point.value > start.value + decrease


def _is_flat(point: Point, start: Point) -> bool:
    return abs(point.slope) <= -CURVATURE * start.slope


def _zoom(
    phi: Phi, start: Point, low: Point, high: Point, most: int, narrowest: float
) -> Point | None:
    """Search between the point of the lowest value that is not too far, and another end."""
    stalled = False
    for _ in range(most):
        a, b = sorted((low.length, high.length))
        if b - a <= max(narrowest, 1e-15 * b):
            break
        t = (a + b) / 2 if not high.is_finite else _cubic_minimum(low, high, a, b)
        t, stalled = _inside(t, a, b, stalled)
        now = phi(t)
        if _is_too_far(now, start) or now.value >= low.value:
            high = now
            continue
        if _is_flat(now, start):
            return now
        if now.slope * (high.length - low.length) >= 0:
            high = low
        low = now
    return low if low.length > 0 else None


def _inside(t: float, a: float, b: float, stalled: bool) -> tuple[float, bool]:
    """Keep t off the ends of a bracket, the second time in a row that it comes close."""
    margin = MARGIN * (b - a)
    if min(b - t, t - a) >= margin:
        return t, False
    if not stalled and a < t < b:
        return t, True
    return (b - margin if b - t < t - a else a + margin), False


def _cubic_minimum(one: Point, other: Point, least: float, most: float) -> float:
    """The minimum, within bounds, of the cubic with the values and slopes of two points."""
    p, q = sorted((one, other))
    if not (p.is_finite and q.is_finite and q.length > p.length):
        return (least + most) / 2
    d = p.slope + q.slope - 3 * (p.value - q.value) / (p.length - q.length)
    square = d * d - p.slope * q.slope
    if not 0 <= square < math.inf:
        return (least + most) / 2
    root = math.sqrt(square)
    bend = q.slope - p.slope + 2 * root
    t = q.length - (q.length - p.length) * (q.slope + root - d) / bend if bend else math.nan
    return min(max(t, least), most) if math.isfinite(t) else (least + most) / 2
