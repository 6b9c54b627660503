"""Line searches as arithmetic on functions of one number."""

from __future__ import annotations

import math

import pytest

from fbopt._line_search.backtracking import backtrack
from fbopt._line_search.search import Point
from fbopt._line_search.strong_wolfe import strong_wolfe


def more_thuente_1(t, b=2.0):
    """Concave near 0, then a minimum at 1.4 (Moré and Thuente 1994, 5.1)."""
    return -t / (t * t + b), (t * t - b) / (t * t + b) ** 2


def more_thuente_2(t, b=0.004):
    """A minimum at 1.596 between steep walls (5.2)."""
    return (t + b) ** 5 - 2 * (t + b) ** 4, 5 * (t + b) ** 4 - 8 * (t + b) ** 3


def more_thuente_3(t, b=0.01, waves=39):
    """Flat sides and many small waves (5.3)."""
    x = waves * math.pi / 2 * t
    value, slope = 2 * (1 - b) / (waves * math.pi) * math.sin(x), (1 - b) * math.cos(x)
    if t <= 1 - b:
        return value + 1 - t, slope - 1
    if t >= 1 + b:
        return value + t - 1, slope + 1
    return value + (t - 1) ** 2 / (2 * b) + b / 2, slope + (t - 1) / b


def yanai(a, c):
    """The functions 5.4 of Moré and Thuente."""

    def gamma(b):
        return math.sqrt(1 + b * b) - b

    def f(t):
        one, two = math.hypot(1 - t, c), math.hypot(t, a)
        value = gamma(a) * one + gamma(c) * two
        return value, -gamma(a) * (1 - t) / one + gamma(c) * t / two

    return f


FUNCTIONS = {
    "1": more_thuente_1,
    "2": more_thuente_2,
    "3": more_thuente_3,
    "4": yanai(0.001, 0.001),
    "5": yanai(0.01, 0.001),
    "6": yanai(0.001, 0.01),
    "quadratic": lambda t: ((t - 3) ** 2, 2 * (t - 3)),
    "log": lambda t: (-math.log(1 + t) + t / 2, -1 / (1 + t) + 0.5),
}


class Phi:
    """A function that notes its points."""

    def __init__(self, function):
        self.function, self.points = function, []

    def __call__(self, t):
        self.points.append(Point(t, *self.function(t)))
        return self.points[-1]


def is_wolfe(point, start):
    low = point.value <= start.value + 1e-4 * point.length * start.slope
    return low and abs(point.slope) <= 0.9 * abs(start.slope)


@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_strong_wolfe_points_are_found(name, first):
    phi, start = Phi(FUNCTIONS[name]), Point(0.0, *FUNCTIONS[name](0.0))
    found = strong_wolfe(phi, start, first)
    assert is_wolfe(found, start)
    assert found == phi.points[-1] and len(phi.points) <= 15


def test_a_first_point_that_fits_is_taken_as_it_is():
    phi = Phi(FUNCTIONS["quadratic"])
    assert strong_wolfe(phi, Point(0.0, 9.0, -6.0), 2.5).length == 2.5 and len(phi.points) == 1


def test_cubics_are_minimised_at_once():
    """One interpolation finds the minimum of a quadratic that the first point overshoots."""
    phi = Phi(FUNCTIONS["quadratic"])
    found = strong_wolfe(phi, Point(0.0, 9.0, -6.0), 8.0)
    assert found.length == pytest.approx(3.0) and len(phi.points) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_points_that_are_not_finite_are_too_far(bad):
    def f(t):
        return ((t - 0.1) ** 2, 2 * (t - 0.1)) if t < 0.3 else (bad, bad)

    start = Point(0.0, *f(0.0))
    found = strong_wolfe(Phi(f), start, 1.0)
    assert found.length < 0.3 and is_wolfe(found, start)
    assert backtrack(Phi(f), start, 1.0, start.value).length < 0.3


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (-math.inf, 1.0), (1.0, math.inf)])
@pytest.mark.parametrize("looks", [False, True])
def test_a_gradient_that_is_not_finite_is_too_far(bad, looks):
    """Where the value is low: both the slope and the steepness are of it."""
    values, points = [], []

    def phi(t):
        points.append(Point(t, -t, *(bad if t > 0.05 else (-1.0, 1.0))))
        return points[-1]

    def look(t):
        values.append(t)
        return -t

    start = Point(0.0, 0.0, -1.0)
    found = backtrack(phi, start, 1.0, 0.0, look if looks else None)
    assert found == points[-1] and found.length == pytest.approx(0.01)
    assert [p.length for p in points] == pytest.approx([1.0, 0.1, 0.01])
    assert values == [p.length for p in points] * looks
    assert strong_wolfe(phi, start, 1.0).length <= 0.05


def test_a_look_saves_the_points_that_are_not_low():
    f, points = FUNCTIONS["quadratic"], []

    def phi(t):
        points.append(Point(t, *f(t)))
        return points[-1]

    found = backtrack(phi, Point(0.0, 9.0, -6.0), 100.0, 9.0, lambda t: f(t)[0])
    assert [found] == points and found.length == pytest.approx(3.0)


def test_nothing_lower_is_no_point():
    phi = Phi(lambda t: (1.0 + t, -1.0))  # a slope that lies
    assert strong_wolfe(phi, Point(0.0, 1.0, -1.0), 1.0) is None and len(phi.points) == 25
    assert backtrack(Phi(lambda t: (math.nan, 0.0)), Point(0.0, 1.0, -1.0), 1.0, 1.0) is None


def test_the_last_of_25_points_counts():
    """A slope that never gets flat, values ever lower: the last point is the best."""
    phi = Phi(lambda t: (-t, -1.0))
    found = strong_wolfe(phi, Point(0.0, 0.0, -1.0), 1.0)
    assert len(phi.points) == 25 and found == phi.points[-1] == min(phi.points, key=lambda p: p[1])


def test_bounds_end_a_search():
    """With a longest length, the lower point there; with a narrowest bracket, the lower end."""
    far = Phi(lambda t: (-t, -1.0))
    assert strong_wolfe(far, Point(0.0, 0.0, -1.0), 1.0, longest=5.0).length == 5.0
    assert max(p.length for p in far.points) == 5.0
    kink = Phi(lambda t: (abs(t - 0.3), -1.0 if t < 0.3 else 1.0))
    found = strong_wolfe(kink, Point(0.0, 0.3, -1.0), 1.0, narrowest=1e-3)
    assert 0.299 < found.length <= 0.3 and len(kink.points) < 15


def test_armijo_takes_the_first_point_that_is_low_enough():
    f = FUNCTIONS["quadratic"]
    phi = Phi(f)
    found = backtrack(phi, Point(0.0, 9.0, -6.0), 100.0, 9.0)
    assert found.value <= 9 + 1e-4 * found.length * -6
    assert [p.length for p in phi.points][:2] == [100.0, 10.0]  # a tenth at least
    assert found.length == pytest.approx(3.0)  # the parabola's minimum, not a half


def test_the_reference_makes_it_nonmonotone():
    phi = Phi(lambda t: (1.0 + t, 0.0))
    assert backtrack(phi, Point(0.0, 1.0, -1.0), 1.0, 2.1).length == 1.0
    assert backtrack(phi, Point(0.0, 1.0, -1.0), 1.0, 1.0) is None
