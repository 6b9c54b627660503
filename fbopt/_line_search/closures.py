"""Calls of the closure in a search: which closures it may see, and how many calls there were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fbopt._engine.data_parallel import wrappers_of
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


# Whose parameters are known to be in no DistributedDataParallel, and which those were.
_looked_at: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, ...]] = WeakKeyDictionary()


def check_processes(
    closure: Any, optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor]
) -> None:
    """Refuse a value of this process's data beside a gradient of all data.

    Whether a plain closure's value is the same on all processes is not known, and to ask them could
    wait for ever; that DistributedDataParallel sums gradients alone is. Looked at once for the same
    parameters.

    Raises:
        ValueError: the closure is plain, and the parameters are those of a
            DistributedDataParallel in a job of several processes.
    """
    ids = tuple(map(id, params))
    if isinstance(closure, FullBatchClosure) or _looked_at.get(optimizer) == ids:
        return
    if wrappers_of(params):
        raise ValueError(
            "the parameters are those of a DistributedDataParallel, which sums gradients over "
            "processes but not the closure's value, so that each process would decide for itself "
            "how far to step: pass FullBatchClosure(model.module, ..., process_group=...), or for "
            "FullBatchGD line_search=None"
        )
    _looked_at[optimizer] = ids


class Calls:
    """Calls a closure for an optimizer, which counts.

    Attributes:
        count: the calls that returned.
    """

    def __init__(self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> None:
        self._closure, self._optimizer, self.count = closure, optimizer, 0
        self._whole = closure if isinstance(closure, FullBatchClosure) else None
        self._buffers = None if self._whole is None else BufferSnapshot(self._whole.model)
        self._before: tuple[BufferSnapshot, int] | None = None

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

    def note_start(self) -> None:
        """Note the model's buffers and the closure's count of steps as they are before all."""
        if self._whole is not None:
            self._before = BufferSnapshot(self._whole.model), self._whole.step
            self._before[0].save()

    def undo(self) -> None:
        """Put back what :meth:`note_start` noted."""
        if self._whole is not None and self._before is not None:
            self._before[0].restore()
            self._whole.step = self._before[1]

    def keep_buffers(self) -> None:
        """Note the model's buffers, as they belong to the parameters as they are."""
        if self._buffers is not None:
            self._buffers.save()

    def put_back_buffers(self) -> None:
        """Put the buffers back to what was noted."""
        if self._buffers is not None:
            self._buffers.restore()
