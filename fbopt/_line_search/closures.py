"""Calls of the closure in a search: which closures it may see, and how many calls there were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fbopt._engine.snapshot import BufferSnapshot
from fbopt.closure import FullBatchClosure
from fbopt.sharpness import SharpnessAware

NEEDS_FUNCTION = "line_search compares values of the function whose gradient it gets, "


def check_closure(closure: Any, line_search: str | None) -> None:
    """Refuse what is no closure, and what a search would compare wrongly.

    Raises:
        TypeError: it cannot be called.
        ValueError: there is a line search, and the closure's gradient is not that of what it
            returns, or that function changes from call to call.
    """
    if not callable(closure):
        raise TypeError(
            f"closure must be callable, got {type(closure).__name__}: a step evaluates the loss "
            "several times; pass the closure itself, not what it returns"
        )
    if line_search is None or not isinstance(closure, FullBatchClosure):
        return
    penalty = closure.penalty
    if isinstance(penalty, SharpnessAware) or closure.chunk_max_norm is not None:
        what = "chunk_max_norm" if closure.chunk_max_norm is not None else "SharpnessAware"
        raise ValueError(
            f"{NEEDS_FUNCTION}and the gradient with {what} is that of no function: pass "
            f"line_search=None, or a closure without {what}"
        )
    if penalty is None:
        return
    if closure.returns != "objective":
        raise ValueError(
            f"{NEEDS_FUNCTION}and this closure returns the loss without its penalty: pass "
            'FullBatchClosure(..., returns="objective"), or line_search=None'
        )
    if callable(penalty.coefficient):
        raise ValueError(
            f"{NEEDS_FUNCTION}and a penalty whose coefficient is a function of the number of calls "
            "changes it at every call: pass a number as coefficient, or line_search=None"
        )


class Calls:
    """Calls a closure for an optimizer, which counts.

    Attributes:
        count: the calls that returned.
    """

    def __init__(self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> None:
        self._closure, self._optimizer, self.count = closure, optimizer, 0
        self._whole = closure if isinstance(closure, FullBatchClosure) else None
        self._buffers = None if self._whole is None else BufferSnapshot(self._whole.model)

    @property
    def has_loss_only(self) -> bool:
        """Whether the closure's value can be had without the gradient, by the same passes."""
        whole = self._whole
        if whole is None or whole.penalty is not None:
            return False
        return whole.vectorize == 1 and not whole.compile

    def loss_only(self) -> Any:
        """Return the loss, and leave ``p.grad`` as it is; see :attr:`has_loss_only`."""
        assert self._whole is not None
        with torch.enable_grad():
            loss = self._whole.loss_only()
        self.count += 1
        return loss

    def __call__(self) -> Any:
        """Fill ``p.grad`` and return what the closure returns."""
        with torch.enable_grad():
            if self._whole is None:
                loss = self._closure()
            else:
                loss = self._whole._accumulate(self._optimizer)
                self._whole.assign()
        self.count += 1
        return loss

    def keep_buffers(self) -> None:
        """Note the model's buffers, as they belong to the parameters as they are."""
        if self._buffers is not None:
            self._buffers.save()

    def put_back_buffers(self) -> None:
        """Put the buffers back to what was noted."""
        if self._buffers is not None:
            self._buffers.restore()
