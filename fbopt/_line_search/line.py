"""phi(t) = f(x + t d) on the parameters themselves, its slope <grad f, d>, the way back to x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import check_grads
from fbopt._engine.flat_rows import FlatRows, Rows, largest, products, rows
from fbopt._line_search.search import Point
from fbopt._ops import dispatch

X, D, G = range(3)


class Line:
    """A start x, a direction d, and the gradient where the parameters are: 3 words per parameter.

    Args:
        params: plain tensors.
        sign: -1 to maximize what the closure returns.
        decay: for each parameter w of a term ``w/2 ||p||^2`` that f has besides; None for none.

    Attributes:
        length: t of the last point.
    """

    def __init__(
        self, params: Sequence[Tensor], sign: int = 1, decay: Sequence[float] | None = None
    ) -> None:
        self.params, self.sign, self.decay = list(params), sign, decay
        layout = FlatRows(self.params)
        self._matrices = layout.make(3)
        self._x, self._d, self._g = (layout.views(rows(self._matrices, k)) for k in (X, D, G))
        self.length = 0.0

    @property
    def start(self) -> Rows:
        """The row of x; after :meth:`take_step` that of the step."""
        return rows(self._matrices, X)

    @property
    def direction(self) -> Rows:
        """The row of d, to be written."""
        return rows(self._matrices, D)

    @property
    def gradient(self) -> Rows:
        """The row of the gradient."""
        return rows(self._matrices, G)

    def begin(self) -> None:
        """Let x be where the parameters are."""
        torch._foreach_copy_(self._x, self.params)
        self.length = 0.0

    def aim_at_parameters(self) -> None:
        """Let d be the way from x to the parameters, in whole units of their rounding."""
        torch._foreach_copy_(self._d, self.params)
        torch._foreach_sub_(self._d, self._x)

    def scale_(self, factors: Sequence[float]) -> None:
        """Multiply each parameter's part of d by a number."""
        torch._foreach_mul_(self._d, list(factors))

    def slope(self) -> tuple[float, float]:
        """Return ``<gradient, d>`` and ``||d||``."""
        found = products(rows(self._matrices, D, D + 1), self.gradient, self.direction)
        slope, square = found[:, 0].tolist()
        return slope, square**0.5

    def move(self, length: float) -> None:
        """Set the parameters to x + t d."""
        torch._foreach_copy_(self.params, self._x)
        torch._foreach_add_(self.params, self._d, alpha=length)
        self.length = length

    def put_back(self) -> None:
        """Set the parameters to x, bit for bit."""
        torch._foreach_copy_(self.params, self._x)
        self.length = 0.0

    def take_step(self) -> float:
        """Replace x by the step from there to the parameters; return its largest magnitude."""
        torch._foreach_neg_(self._x)
        torch._foreach_add_(self._x, self.params)
        return largest(self.start).item()

    def point(self, returned: Any) -> Point:
        """The point where the parameters are and ``p.grad`` is, for what a closure returned."""
        value = self.value(returned)
        self._take_gradient()
        slope = products(rows(self._matrices, D, D + 1), self.gradient, self.gradient)[0, 0]
        numbers = torch.stack([slope, largest(self.gradient).to(slope.device)])
        return Point(self.length, value, *numbers.tolist())

    def value(self, returned: Any) -> float:
        """The value of f, for what a closure returned."""
        value = self.sign * _number(returned)
        return value if self.decay is None else value + self._decay_value(self.decay)

    def _decay_value(self, decay: Sequence[float]) -> float:
        total = 0.0
        for weight in dict.fromkeys(decay):
            part = [p for p, w in zip(self.params, decay, strict=True) if w == weight]
            total += weight / 2 * dispatch.squared_norm(part).item() if weight else 0.0
        return total

    def _take_gradient(self) -> None:
        """Copy the gradient from ``p.grad``; zeros where there is none."""
        grads = [p.grad for p in self.params]
        check_grads(grads, self.params, "p.grad")
        for view, g in zip(self._g, grads, strict=True):
            if g is None:
                view.zero_()
        pairs = [(v, g) for v, g in zip(self._g, grads, strict=True) if g is not None]
        if pairs:
            torch._foreach_copy_([v for v, _ in pairs], [g for _, g in pairs])
        if self.sign < 0:
            torch._foreach_neg_(self._g)
        if self.decay is not None:
            torch._foreach_add_(self._g, torch._foreach_mul(self.params, list(self.decay)))


def _number(returned: Any) -> float:
    """What a closure returned as a number; errors of the device it lies on are not hidden."""
    is_one = not isinstance(returned, Tensor) or (
        returned.numel() == 1 and not returned.is_complex()
    )
    try:
        if is_one:
            return float(returned)
    except (TypeError, ValueError):
        pass
    raise TypeError(
        "closure must return the loss, a number or a tensor of one element, got "
        f"{type(returned).__name__}"
    )
