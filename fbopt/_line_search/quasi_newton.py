"""Iterations of L-BFGS over fixed parameters: direction, search, pair, and why to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbopt._engine.flat_rows import largest
from fbopt._engine.history import History
from fbopt._line_search.backtracking import backtrack
from fbopt._line_search.closures import Calls
from fbopt._line_search.line import Line
from fbopt._line_search.search import Point, remembered
from fbopt._line_search.strong_wolfe import strong_wolfe

Options = Mapping[str, Any]
FAILED = "no lower value found along the direction (line search)"
NOT_FINITE = "the loss or its gradient is not finite"


class Aim(NamedTuple):
    """What is known of a direction d = -k lr H g."""

    slope: float
    first: float  # the length that the search begins at
    longest: float  # the bound of lengths
    scale: float  # k times the largest lr


class QuasiNewton:
    """L-BFGS on these parameters, and all that it has learnt.

    Args:
        params: plain tensors.
        size: the most pairs.
        device: where to keep them; None for the parameters' own.
        sign: -1 to maximize.

    Attributes:
        iterations: how many there were.
        failure: what went wrong in the last run; None if nothing did.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        size: int,
        device: torch.device | None,
        sign: int,
    ) -> None:
        self._line, self._history = Line(params, sign), History(params, size, device)
        self._values: list[float] = []
        # t k lr of a step after which the gradient was not asked for: its pair is still to come.
        self._open_step: float | None = None
        self.iterations = 0
        self.failure: str | None = None

    def run(self, calls: Calls, options: Options, rates: Sequence[float]) -> tuple[Any, str]:
        """Iterate up to ``max_iter`` times.

        Args:
            calls: the closure.
            options: those of the optimizer.
            rates: the learning rate of each parameter.

        Returns:
            What the closure returned at the start, and why the iterations ended.
        """
        self.failure = None
        loss = calls()
        now = self._line.point(loss)
        reason = self._take_up(now, calls, options)
        most = options["max_eval"] or options["max_iter"] * 5 // 4
        for left in reversed(range(options["max_iter"])):
            if reason is not None:
                break
            now, reason = self._iterate(now, calls, options, rates, is_last=left == 0)
            self.iterations += 1
            if reason is None and calls.count >= most:
                reason = "max_eval reached"
        return loss, reason or "max_iter reached"

    def _take_up(self, now: Point, calls: Calls, options: Options) -> str | None:
        """Begin at the gradient where the parameters are; return a reason to stop."""
        line, history, length = self._line, self._history, self._open_step
        self._open_step = None
        if not now.is_sound:
            history.clear()
            if length is not None:  # the step that led here was not looked at
                line.put_back()
            self.failure = NOT_FINITE
            return NOT_FINITE
        calls.keep_buffers()
        if length is None:
            history.begin(line.gradient)
        else:
            line.take_step()
            history.add(line.start, line.gradient, length if options["damping"] else None)
        if not self._values or self._values[-1] != now.value:
            self._values = remembered(self._values, now.value)
        return self._reason(options, now)

    def _iterate(
        self,
        now: Point,
        calls: Calls,
        options: Options,
        rates: Sequence[float],
        is_last: bool,
    ) -> tuple[Point, str | None]:
        """Make one iteration; return the point where the parameters are, and a reason to stop."""
        line = self._line
        line.begin()
        aim = self._aim(options, rates)
        if not aim.slope < -options["tolerance_change"]:
            return now, "slope within tolerance_change"
        if options["line_search"] is None and is_last:
            line.move(aim.first)
            self._open_step = aim.first * aim.scale
            return now, None
        try:
            found = self._search(now, aim, calls, options)
        except BaseException:
            self._return(calls)
            raise
        if found is None:
            return now, self._begin_anew(calls)
        change = line.take_step()
        scale = found.length * aim.scale if options["damping"] else None
        self._history.add(line.start, line.gradient, scale)
        calls.keep_buffers()
        self._values = remembered(self._values, found.value)
        return found, self._reason(options, found, change, abs(found.value - now.value))

    def _aim(self, options: Options, rates: Sequence[float]) -> Aim:
        """Write the direction: that of the pairs if it descends, or else of the gradient."""
        line, history, bound = self._line, self._history, options["max_norm"]
        history.direction_(line.direction)
        slope, norm = line.slope()
        descends = slope < 0  # whatever the rates are: with lr = 0 the pairs are kept
        shorter = 1.0 if bound is None or not norm > bound else bound / norm
        if any(rate * shorter != 1 for rate in rates):
            line.scale_([rate * shorter for rate in rates])
            slope, _ = line.slope()
        if history.count and not (descends and slope <= 0):
            history.clear()
            return self._aim(options, rates)
        first = 1.0 if history.count else min(1.0, 1 / max(shorter * norm, 1e-300))
        longest = math.inf if bound is None else bound / max(shorter * norm, 1e-300)
        return Aim(slope, first, longest, shorter * max(rates))

    def _search(self, now: Point, aim: Aim, calls: Calls, options: Options) -> Point | None:
        """Search for a point; if there is one, the parameters are there."""
        line, kind = self._line, options["line_search"]

        def phi(length: float) -> Point:
            line.move(length)
            return line.point(calls())

        start = Point(0.0, now.value, aim.slope)
        if kind is None:
            found: Point | None = phi(aim.first)
        elif kind == "strong_wolfe":
            narrowest = options["tolerance_change"] / largest(line.direction).item()
            bounds = {"longest": aim.longest, "narrowest": narrowest}
            found = strong_wolfe(phi, start, aim.first, **bounds)
        else:
            reference = max(self._values) if kind == "nonmonotone" else now.value
            found = backtrack(phi, start, aim.first, reference)
        if found is not None and found.length != line.length:
            found = phi(found.length)
        return found if found is not None and found.is_sound else None

    def _begin_anew(self, calls: Calls) -> str | None:
        """After a search that failed: forget the pairs; without any, return a reason to stop."""
        self._return(calls)
        self.failure, self._values = FAILED, self._values[-1:]
        if self._history.count == 0:
            return FAILED
        self._history.clear()
        return None

    def _return(self, calls: Calls) -> None:
        """Go back to the last iteration: parameters, buffers and gradient."""
        self._line.put_back()
        calls.put_back_buffers()
        for own, g in zip(self._line.gradient, self._history.gradient, strict=True):
            own.copy_(g)

    def _reason(
        self,
        options: Options,
        now: Point,
        change: float = math.inf,
        difference: float = math.inf,
    ) -> str | None:
        """Why to stop where the parameters are, if there is a reason."""
        if now.steepness <= options["tolerance_grad"]:
            return "gradient within tolerance_grad"
        if change <= options["tolerance_change"]:
            return "change of the parameters within tolerance_change"
        if difference < options["tolerance_change"]:
            return "change of the loss within tolerance_change"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that was learnt."""
        is_open = self._open_step is not None
        return {
            "history": self._history.state_dict(),
            "start": [x.clone() for x in self._line.start] if is_open else None,
            "open_step": self._open_step,
            "values": list(self._values),
            "iterations": self.iterations,
        }

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a saved :meth:`state_dict` is of these parameters and this size."""
        return self._history.fits(state["history"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`; see :meth:`History.load_state_dict`."""
        self._history.load_state_dict(state["history"])
        self._open_step, self._values = state["open_step"], list(state["values"])
        self.iterations = state["iterations"]
        for x, saved in zip(self._line.start, state["start"] or (), strict=False):
            x.copy_(saved)
