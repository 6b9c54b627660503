"""The forward pass of a chunk: L_c(theta), by loss_fn(model(input), target) or evaluate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._engine.inputs import check_loss, pair
from fbopt._sharding import gathered


@dataclass(frozen=True)
class ChunkLoss:
    """The mean loss of a chunk. Fields as for FullBatchClosure; `device` is the parameters'."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor] | None
    evaluate: Callable[[nn.Module, Any], Tensor] | None
    autocast: torch.dtype | None
    device: torch.device

    def __call__(self, index: int, chunk: Any) -> tuple[Tensor, Any, Any]:
        """Return (mean loss, output, target); the last two are None where ``evaluate`` is given."""
        # Autocast caches cast weights by parameter; a perturbation would not change them.
        torch.clear_autocast_cache()
        with self._autocast():
            if self.evaluate is not None:
                return self.evaluate(self.model, chunk), None, None
            inputs, target = pair(index, chunk)
            output = self.model(inputs)
            return self.loss_fn(output, target), output, target

    def differentiable(self, index: int, chunk: Any) -> tuple[Tensor, Any, Any]:
        """Return the same with an autograd graph; the loss has to depend on a parameter."""
        with torch.enable_grad():
            loss, output, target = self(index, chunk)
            loss = gathered(loss)
        check_loss(index, loss, "evaluate" if self.evaluate else "loss_fn")
        return loss, output, target

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)
