"""The forward pass of a chunk: L_c(theta), by loss_fn(model(input), target) or evaluate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._engine.inputs import check_loss, pair, refuse_second_loss
from fbopt._sharding import gathered

BARE = object()


def autocast_suspended(
    device: torch.device,
) -> contextlib.AbstractContextManager[torch.dtype | None]:
    """Switch the caller's autocast off and yield its dtype: it is meant for forward passes alone.

    Backward passes within it would compute in other dtypes than the forward pass did.
    """
    is_on = torch.is_autocast_enabled(device.type)
    return _suspended(device) if is_on else contextlib.nullcontext()


@contextlib.contextmanager
def _suspended(device: torch.device) -> Iterator[torch.dtype]:
    with torch.autocast(device.type, enabled=False):
        yield torch.get_autocast_dtype(device.type)


@dataclass(frozen=True)
class ChunkLoss:
    """The mean loss of a chunk. Fields as for FullBatchClosure; `device` is where it computes,
    `is_observed` says that somebody looks at aux.

    Autocast caches cast weights by parameter, which a perturbation would not change: its cache is
    cleared before each pass.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor] | None
    evaluate: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]] | None
    autocast: torch.dtype | None
    device: torch.device
    is_observed: bool = True

    def __call__(self, index: int, chunk: Any) -> tuple[Tensor, Any, Any]:
        """Return the mean loss and what ``observe`` is called with.

        That is (output, target), or (aux, chunk) where ``evaluate`` is given; aux is BARE where
        that returned the loss alone.
        """
        torch.clear_autocast_cache()
        return self.compute(index, chunk)

    def compute(self, index: int, chunk: Any) -> tuple[Tensor, Any, Any]:
        """Do so, where autocast's cache holds nothing."""
        if self.autocast is None:
            return self._compute(index, chunk)
        with torch.autocast(self.device.type, dtype=self.autocast):
            return self._compute(index, chunk)

    def _compute(self, index: int, chunk: Any) -> tuple[Tensor, Any, Any]:
        if self.evaluate is not None:
            found = self.evaluate(self.model, chunk)
            is_pair = isinstance(found, tuple) and len(found) == 2
            loss, aux = found if is_pair else (found, BARE)
            if is_pair and not self.is_observed:
                refuse_second_loss(index, found)
            return loss, aux, chunk
        inputs, target = pair(index, chunk)
        output = self.model(inputs)
        return self.loss_fn(output, target), output, target

    def differentiable(self, index: int, chunk: Any) -> tuple[Tensor, Any, Any]:
        """Return the same with an autograd graph; the loss has to depend on a parameter."""
        torch.clear_autocast_cache()
        with torch.enable_grad():
            loss, output, target = self.compute(index, chunk)
            if type(loss) is not Tensor:
                loss = gathered(loss)
        check_loss(index, loss, "evaluate" if self.evaluate else "loss_fn")
        return loss, output, target
