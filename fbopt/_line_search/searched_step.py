"""A gradient step of searched length: p <- p + t d with d = p' - p of the step as it would be.

The function searched is the closure's with ``weight_decay / 2 ||p||^2``, as is the step's gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._line_search.backtracking import backtrack
from fbopt._line_search.closures import Calls
from fbopt._line_search.line import Line
from fbopt._line_search.search import Point, remember
from fbopt._line_search.strong_wolfe import strong_wolfe
from fbopt._sharding import any_sharded

VALUES = "last_values"
BUFFER = "momentum_buffer"


class SearchedStep:
    """Takes the steps of an optimizer of the SGD kind along their directions.

    Attributes:
        length: t of the last step, in units of lr; 0 where the search failed.
        evaluations: how often the last step evaluated the closure.
    """

    def __init__(self) -> None:
        self._line: Line | None = None
        self._key: Any = None
        self._has_warned = False
        self._failure: str | None = None
        self.length, self.evaluations = 0.0, 0

    def __call__(
        self, optimizer: torch.optim.Optimizer, calls: Calls, update: Callable[[], None]
    ) -> Any:
        """Take one step; return what the closure returned at the start.

        Args:
            optimizer: whose groups have ``line_search``, ``weight_decay`` and the like.
            calls: of a closure that has been checked.
            update: takes the optimizer's step on ``p.grad``.
        """
        line = self._follow(optimizer)
        line.begin()
        loss, now = line.measure(calls)
        calls.keep_buffers()
        momenta = _Momenta(optimizer, line.params)
        self._failure, found = None, None
        try:
            if math.isfinite(now.value) and math.isfinite(line.steepness):
                slope = self._aim(optimizer, momenta, update)
                if slope == 0:
                    line.put_back()
                    found = now
                else:
                    found = self._search(optimizer, calls, now, slope)
        except BaseException:
            line.put_back()
            calls.put_back_buffers()
            momenta.put_back()
            raise
        if found is None:
            self._give_up(calls, momenta)
        self.length, self.evaluations = line.length, calls.count
        if self._failure is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"line_search: {self._failure}. Further times show in last_length alone",
                RuntimeWarning,
                stacklevel=6,  # the caller of step, which torch wraps
            )
        return loss

    def _follow(self, optimizer: torch.optim.Optimizer) -> Line:
        pairs = [(p, g) for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        params = [p for p, _ in pairs]
        if any_sharded(params):
            raise ValueError(
                "line_search: params are sharded (DTensor), over which there are no inner products "
                "yet: pass line_search=None"
            )
        if len({bool(g["maximize"]) for _, g in pairs}) > 1:
            raise ValueError(
                "maximize differs between parameter groups, and line_search needs one function: "
                "set one for all groups, or pass line_search=None"
            )
        sign = -1 if any(g["maximize"] for _, g in pairs) else 1
        decay = [float(g["weight_decay"]) for _, g in pairs]
        key = [(id(p), p.shape, p.dtype, p.device) for p in params]
        if key != self._key or self._line is None:
            self._line, self._key = Line(params), key
        self._line.sign, self._line.decay = sign, decay if any(decay) else None
        return self._line

    def _aim(
        self, optimizer: torch.optim.Optimizer, momenta: _Momenta, update: Callable[[], None]
    ) -> float:
        """Write the direction and return its slope: that of the step, or of the gradient."""
        line = self._line
        assert line is not None
        update()
        line.aim_at_parameters()
        slope, _ = line.slope()
        if slope < 0:
            return slope
        momenta.clear()
        line.aim_downhill(_rates(optimizer), optimizer.param_groups[0]["max_norm"])
        slope, _ = line.slope()
        if slope < 0:
            self._failure = "the step was no direction of descent, and its momentum is dropped"
        return slope

    def _search(
        self, optimizer: torch.optim.Optimizer, calls: Calls, now: Point, slope: float
    ) -> Point | None:
        line, first = self._line, optimizer.param_groups[0]
        assert line is not None
        kind, start = first["line_search"], now._replace(length=0.0, slope=slope)

        def phi(length: float) -> Point:
            line.move(length)
            return line.measure(calls)[1]

        def value_alone(length: float) -> Point:
            line.move(length)
            return Point(length, line.value(calls.loss_only()), math.nan)

        if kind == "strong_wolfe":
            found = strong_wolfe(phi, start, 1.0)
        else:
            values = first.setdefault(VALUES, []) if kind == "nonmonotone" else []
            remember(values, now.value)
            at = value_alone if calls.has_loss_only else phi
            found = backtrack(at, start, 1.0, max(values))
        if found is not None and found.length != line.length:
            found = phi(found.length)
        return found

    def _give_up(self, calls: Calls, momenta: _Momenta) -> None:
        assert self._line is not None
        self._line.put_back()
        calls.put_back_buffers()
        momenta.clear()
        self._failure = "no lower value was found; parameters are as before, momentum is dropped"


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    groups = optimizer.param_groups
    return [float(g["lr"]) for g in groups for p in g["params"] if p.requires_grad]


class _Momenta:
    """The momenta of parameters as they are now."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        self._state, self._params = optimizer.state, params
        self._known = [p in self._state for p in params]
        found = [self._state[p].get(BUFFER) if p in self._state else None for p in params]
        self._saved = [None if b is None else b.clone() for b in found]

    def put_back(self) -> None:
        """Put all back, bit for bit."""
        for p, known, saved in zip(self._params, self._known, self._saved, strict=True):
            if not known:
                self._state.pop(p, None)
            elif BUFFER in self._state[p]:
                self._state[p][BUFFER] = saved

    def clear(self) -> None:
        """Drop them: the next step begins anew."""
        for p in self._params:
            if p in self._state:
                self._state[p][BUFFER] = None
