"""``p.grad`` in the memory of sums: the mean of the last step, which the next sum overwrites."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fbopt._engine.gradient_sums import GradientSums


class AssignedMeans:
    """The gradients that have been set from the means of sums.

    Args:
        sums: the sums.
    """

    def __init__(self, sums: GradientSums) -> None:
        self._sums = sums
        self._set: list[weakref.ref[Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Forget which gradients these are: a copy has its own parameters."""
        return {"_sums": self._sums, "_set": []}

    def assign(self, means: Sequence[Tensor | None]) -> None:
        """Set ``p.grad``."""
        for p, g in zip(self._sums.params, means, strict=True):
            p.grad = g
        self._set = [weakref.ref(g) for g in means if g is not None]

    def refuse(self, grads: Sequence[Tensor | None]) -> None:
        """Raise ValueError for gradients to add that lie in the sums' memory."""
        if not self._sums.is_mean and not self._set:
            return
        if found := self._sums.holding(grads):
            raise ValueError(
                f"grads[{found[0]}] lies in the accumulator's memory, where mean() or to_grad() "
                "has left the last mean: call optimizer.zero_grad() with set_to_none=True (the "
                "default) before loss.backward(), or pass clones"
            )

    def release(self) -> None:
        """Take ``p.grad`` out of the sums' memory, which ``backward()`` would add to."""
        params = self._sums.params
        for i in self._sums.holding([p.grad if p.is_leaf else None for p in params]):
            params[i].grad = None

    def drop(self) -> None:
        """Set the gradients of :meth:`assign` to None, unless others have taken their place."""
        if live := [p for p in self._sums.params if self._set and p.grad is not None]:
            own = {id(grad) for ref in self._set if (grad := ref()) is not None}
            for p in live:
                p.grad = None if id(p.grad) in own else p.grad
        self._set = []
