"""The loss of some samples as a function of copies of the parameters, in float64 or in their own
dtype: differences that are no rounding, and nothing written to the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fbopt._diagnosis.passes import distance
from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.setup import rows
from fbopt._direction import Direction
from fbopt._engine.autograd_graph import nodes
from fbopt._engine.perturb import hessian_product

R = TypeVar("R")
Tensors = list[Tensor]


class CopyLoss:
    """The mean loss of samples at other parameters, L(theta), and what is derived from it.

    All derivatives are taken while the model holds the copies, which checkpoints need.

    Args:
        probe: whose model and loss.
        dtype: of the copies and of the chunks' floating tensors; None keeps each one's own.

    Attributes:
        names: the parameters that theta stands for: those of the closure that are in the model.
    """

    def __init__(self, probe: Probe, dtype: torch.dtype | None = torch.float64) -> None:
        self._dtype, self._call = dtype, _Call(probe)
        self._all = dict(probe.model.named_parameters())
        wanted = {id(p) for p in probe.params}
        self.names = [name for name, p in self._all.items() if id(p) in wanted]

    def start(self) -> Tensors:
        """The model's parameters, copied."""
        return [self._cast(self._all[name].detach()).clone() for name in self.names]

    def value(self, theta: Tensors, chunk: Any) -> float:
        """The loss."""
        return self._derive(theta, chunk, lambda loss, leaves: loss.item())

    def gradient(self, theta: Tensors, chunk: Any) -> tuple[float, Tensors]:
        """Loss and gradient, zeros for parameters that the loss does not reach."""
        return self._derive(theta, chunk, lambda loss, p: (loss.item(), _dense(_grads(loss, p), p)))

    def product(self, theta: Tensors, chunk: Any) -> tuple[Tensors, str | Tensors, list[Any]]:
        """The gradient g, H g by double backward, and the nodes of the loss's graph.

        In place of H g the message, where torch refuses to differentiate twice.
        """

        def derive(loss: Tensor, leaves: Tensors) -> tuple[Tensors, str | Tensors, list[Any]]:
            every, grads = list(nodes(loss)), _grads(loss, leaves, create_graph=True)
            g = [x.detach() for x in _dense(grads, leaves)]
            try:
                return g, hessian_product(grads, leaves, Direction(), [None] * len(leaves)), every
            except RuntimeError as error:
                return g, " ".join(str(error).split()), every

        return self._derive(theta, chunk, derive)

    def _derive(self, theta: Tensors, chunk: Any, derive: Callable[[Tensor, Tensors], R]) -> R:
        leaves = [t.detach().requires_grad_() for t in theta]
        held = {n: self._cast(t.detach()) for n, t in self._call.named_parameters()}
        held |= {n: self._cast(b.clone()) for n, b in self._call.named_buffers()}
        held |= {f"model.{n}": t for n, t in zip(self.names, leaves, strict=True)}
        with torch.enable_grad():
            torch.clear_autocast_cache()
            arguments = mapped(self._cast, chunk), lambda loss: derive(loss, leaves)
            return torch.func.functional_call(self._call, held, arguments)

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self._dtype) if self._dtype and t.is_floating_point() else t


class _Call(nn.Module):
    """The model with its loss, as one module."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.model, self._loss = probe.model, probe.forward
        if isinstance(probe.closure.loss_fn, nn.Module):
            self.loss_fn = probe.closure.loss_fn  # whose class weights are cast, too

    def forward(self, chunk: Any, derive: Callable[[Tensor], R]) -> R:
        """What is derived from the mean loss of a chunk."""
        return derive(self._loss(0, chunk)[0])


def _grads(loss: Tensor, leaves: Tensors, create_graph: bool = False) -> list[Tensor | None]:
    grads = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
    if all(g is None for g in grads):
        raise RuntimeError("the model does not use the parameters that it is given")
    return list(grads)


def _dense(grads: list[Tensor | None], leaves: Tensors) -> Tensors:
    pairs = zip(grads, leaves, strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in pairs]


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


def some_samples(chunk: Any, most: int) -> Any:
    """The first samples of a chunk, or all where it cannot be divided."""
    length = rows(chunk)
    return chunk if length is None else take(chunk, 0, most, length)


def moved(theta: Tensors, along: Tensors, radius: float) -> Tensors:
    """Theta + radius v / ||v||."""
    step = radius / distance(along)
    return [t + (step * v).to(t.dtype) for t, v in zip(theta, along, strict=True)]


def difference(
    probe: Probe, loss: CopyLoss, theta: Tensors, chunk: Any, radius: float, method: str
) -> tuple[Tensors, Tensors]:
    """The gradient g, and H g / ||g|| by forward or central differences of this radius."""

    def gradient(at: Tensors) -> Tensors:
        probe.draws.rewind()
        return loss.gradient(at, chunk)[1]

    probe.draws.begin()
    g = gradient(theta)
    if distance(g) == 0:
        raise ValueError("the gradient is zero")
    plus, minus, width = gradient(moved(theta, g, radius)), g, radius
    if method == "central":
        minus, width = gradient(moved(theta, g, -radius)), 2 * radius
    pairs = zip(plus, minus, strict=True)
    return g, [(p.double() - m.double()) / width for p, m in pairs]
