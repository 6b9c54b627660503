"""The loss of some samples as a function of copies of the parameters, in float64 or in their own
dtype: differences that are no rounding, and nothing written to the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._diagnosis.probe import Probe

Tensors = list[Tensor]


class CopyLoss:
    """The mean loss of samples at other parameters, L(theta), and its gradient.

    Args:
        probe: whose model and loss.
        dtype: of the copies and of the chunks' floating tensors; None keeps each one's own.

    Attributes:
        names: the parameters that theta stands for: those of the closure that are in the model.
    """

    def __init__(self, probe: Probe, dtype: torch.dtype | None = torch.float64) -> None:
        self._probe, self._dtype, self._call = probe, dtype, _Call(probe)
        self._all = dict(probe.model.named_parameters())
        wanted = {id(p) for p in probe.params}
        self.names = [name for name, p in self._all.items() if id(p) in wanted]

    def start(self) -> Tensors:
        """The model's parameters, copied."""
        return [self._cast(self._all[name].detach()).clone() for name in self.names]

    def gradient(self, theta: Tensors, chunk: Any, graph: bool = False) -> tuple[Tensor, Tensors]:
        """Loss and gradient, zeros for parameters that the loss does not reach."""
        leaves = [t.detach().requires_grad_() for t in theta]
        loss = self._loss(leaves, chunk)
        grads = torch.autograd.grad(loss, leaves, create_graph=graph, allow_unused=True)
        if all(g is None for g in grads):
            raise RuntimeError("the model does not use the parameters that it is given")
        self.leaves = leaves
        return loss, [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)
        ]

    def _loss(self, theta: Tensors, chunk: Any) -> Tensor:
        tensors = {f"model.{n}": self._cast(t.detach()) for n, t in self._all.items()}
        tensors |= {
            f"model.{n}": self._cast(b.clone()) for n, b in self._probe.model.named_buffers()
        }
        tensors |= {f"model.{n}": t for n, t in zip(self.names, theta, strict=True)}
        with torch.enable_grad():
            return torch.func.functional_call(self._call, tensors, (mapped(self._cast, chunk),))

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self._dtype) if self._dtype and t.is_floating_point() else t


class _Call(nn.Module):
    """The model with its loss, as one module."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.model, self._loss = probe.model, probe.forward

    def forward(self, chunk: Any) -> Tensor:
        """The mean loss of a chunk."""
        return self._loss(0, chunk)[0]


def mapped(change: Any, chunk: Any) -> Any:
    """The chunk with every tensor changed; containers keep their types."""
    if isinstance(chunk, Tensor):
        return change(chunk)
    if isinstance(chunk, Mapping):
        found = copy.copy(chunk)
        for key, value in chunk.items():
            found[key] = mapped(change, value)  # type: ignore[index]
        return found
    if isinstance(chunk, Sequence) and not isinstance(chunk, str):
        items = [mapped(change, item) for item in chunk]
        return type(chunk)(*items) if hasattr(chunk, "_fields") else type(chunk)(items)
    return chunk


def take(chunk: Any, start: int, stop: int, length: int) -> Any:
    """Some samples of a chunk: the rows of all tensors that have `length` of them."""
    return mapped(lambda t: t[start:stop] if t.dim() and len(t) == length else t, chunk)
