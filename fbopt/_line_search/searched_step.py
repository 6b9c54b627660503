"""A gradient step of searched length: p <- p + t d with d = p' - p of the step as it would be.

The function searched is the closure's with ``weight_decay / 2 ||p||^2``, as is the step's gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._line_search.backtracking import backtrack
from fbopt._line_search.closures import Calls
from fbopt._line_search.line import Line
from fbopt._line_search.search import Point, remembered
from fbopt._line_search.strong_wolfe import strong_wolfe
from fbopt._sharding import any_sharded
from fbopt.clip import check_finite

VALUES = "last_values"
BUFFER = "momentum_buffer"
NOTHING_LOWER = "no lower value was found"
UPHILL = "neither the step nor one without momentum is a direction of descent"


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
        calls.note_start()
        momenta = _Momenta(optimizer, line.params)
        self._failure = None
        try:
            loss = calls()
            line.decay = _decay(optimizer)
            now = line.point(loss)
            calls.keep_buffers()
            if now.is_sound:
                self._go(optimizer, calls, now, momenta, update)
            else:
                self._stay(optimizer, now)
        except BaseException:
            line.put_back()
            calls.undo()
            momenta.put_back()
            raise
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
        key = [(id(p), p.shape, p.dtype, p.device) for p in params]
        if key != self._key or self._line is None:
            self._line, self._key = Line(params), key
        self._line.sign = sign
        return self._line

    def _go(
        self,
        optimizer: torch.optim.Optimizer,
        calls: Calls,
        now: Point,
        momenta: _Momenta,
        update: Callable[[], None],
    ) -> None:
        """Take the step from a point of finite value and gradient."""
        assert self._line is not None
        slope = self._aim(momenta, update)
        if slope == 0:
            self._line.put_back()
            if now.steepness > 0 and all(g["lr"] > 0 for g in optimizer.param_groups):
                self._failure = "the step is lost in the rounding of the parameters: raise lr"
        elif not slope < 0:
            self._give_up(optimizer, calls, momenta, UPHILL)
        elif not self._search(optimizer, calls, now._replace(slope=slope)):
            self._give_up(optimizer, calls, momenta, NOTHING_LOWER)

    def _aim(self, momenta: _Momenta, update: Callable[[], None]) -> float:
        """Write the direction and return its slope: of the step, or of one without momentum."""
        line = self._line
        assert line is not None
        update()
        line.aim_at_parameters()
        slope, length = line.slope()
        if slope < 0 or length == 0:
            return slope
        momenta.clear()
        line.put_back()
        update()
        line.aim_at_parameters()
        slope, _ = line.slope()
        if slope < 0:
            self._failure = "the step was no direction of descent, and its momentum is dropped"
        return slope

    def _search(self, optimizer: torch.optim.Optimizer, calls: Calls, start: Point) -> bool:
        """Go to a point that is low enough; return whether there is one."""
        line, first = self._line, optimizer.param_groups[0]
        assert line is not None
        kind, values = first["line_search"], [start.value]

        def phi(length: float) -> Point:
            line.move(length)
            return line.point(calls())

        def look(length: float) -> float:
            line.move(length)
            return line.value(calls.loss_only())

        if kind == "strong_wolfe":
            found = strong_wolfe(phi, start, 1.0)
        else:
            if kind == "nonmonotone":
                values = remembered(first.get(VALUES, ()), start.value)
            cheap = look if calls.has_loss_only else None
            found = backtrack(phi, start, 1.0, max(values), cheap)
        if found is not None and found.length != line.length:
            found = phi(found.length)
        is_found = found is not None and found.is_sound
        if is_found and kind == "nonmonotone":
            first[VALUES] = values  # another list: state dicts hold the one before
        return is_found

    def _stay(self, optimizer: torch.optim.Optimizer, now: Point) -> None:
        """Do not go on from a point that is not finite."""
        if optimizer.param_groups[0]["error_if_nonfinite"]:
            check_finite(torch.tensor(now.steepness))
        self._failure = (
            "the loss or its gradient is not finite; parameters and momentum are as before"
        )

    def _give_up(
        self, optimizer: torch.optim.Optimizer, calls: Calls, momenta: _Momenta, why: str
    ) -> None:
        assert self._line is not None
        self._line.put_back()
        calls.put_back_buffers()
        momenta.clear()
        optimizer.param_groups[0].pop(VALUES, None)
        self._failure = f"{why}; parameters are as before, momentum is dropped"


def _decay(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """The decay of each parameter, of which one without a gradient is left alone; None for none."""
    found = [
        0.0 if p.grad is None else float(group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]
    return found if any(found) else None


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
