"""The gradients of V chunks at the points of K networks, by one pass over all of them.

L_kc(θ_k) summed over networks k and chunks c has the gradient ∇L_kc(θ_k) in the row of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fbopt.train.losses import Loss


class Stack(NamedTuple):
    """V chunks of n samples each; of every network, or shared by all.

    Attributes:
        input: (V, n, …), or (K, V, n, …) where each network has its own.
        target: int64 (V, n) or (K, V, n).
        shared: whether all networks have the same.
    """

    input: Tensor
    target: Tensor
    shared: bool

    @property
    def size(self) -> int:
        """The number n of samples in each chunk."""
        return self.target.shape[-1]


class Pass(NamedTuple):
    """What a pass gives.

    Attributes:
        grads: (K, V, P), without graph.
        losses: (K, V).
        correct: int64 (K, V), the samples that were classified correctly.
    """

    grads: Tensor
    losses: Tensor
    correct: Tensor


class StackedGradient:
    """Gradients of networks that differ in their parameters alone.

    Args:
        model: the architecture, without buffers; its own parameters are not used.
        loss_fn: the mean loss of a chunk, of logits (n, classes) and labels (n,).
        compiled: whether torch.compile makes the passes; once for each shape.

    Attributes:
        layout: the names and shapes of the parameters, in the order in which a row holds them.
    """

    def __init__(self, model: nn.Module, loss_fn: Loss, compiled: bool = False) -> None:
        self.layout = {name: p.shape for name, p in model.named_parameters()}
        self._model, self._loss_fn = model.to("meta"), loss_fn
        self._sizes = [shape.numel() for shape in self.layout.values()]
        self._compiled = compiled
        self._functions: dict[tuple[bool, bool], Callable[..., Any]] = {}

    def __call__(self, points: Tensor, chunks: Stack) -> Pass:
        """The gradients at points (K, P), one for all of a network's chunks, or (K, V, P)."""
        count = chunks.target.shape[0 if chunks.shared else 1]
        single = count == 1
        at = 0 if chunks.shared else 1
        input, target = (t.squeeze(at) if single else t for t in chunks[:2])
        if single:
            leaf = points.detach().reshape(len(points), -1)
        else:
            leaf = points.detach() if points.dim() == 3 else points.detach().unsqueeze(1)
            leaf = leaf.expand(-1, count, -1)
        leaf.requires_grad_()
        with torch.enable_grad():
            losses, correct = self._function(single, chunks.shared)(leaf, input, target)
            (grads,) = torch.autograd.grad(losses.sum(), leaf)
        if single:
            return Pass(grads.unsqueeze(1), losses.detach().unsqueeze(1), correct.unsqueeze(1))
        return Pass(grads, losses.detach(), correct)

    def logits(self, points: Tensor, input: Tensor) -> Tensor:
        """The outputs (K, n, classes) of networks (K, P) for the same samples (n, …)."""
        return vmap(self._outputs, in_dims=(0, None))(points, input)

    def _function(self, single: bool, shared: bool) -> Callable[..., tuple[Tensor, Tensor]]:
        """The losses and correct samples of all networks and chunks, made once for each kind."""
        if (single, shared) not in self._functions:
            function = self._loss if single else vmap(self._loss)
            own = None if shared else 0
            function = vmap(function, in_dims=(0, own, own))
            if self._compiled:
                function = torch.compile(function, fullgraph=True, dynamic=False)
            self._functions[single, shared] = function
        return self._functions[single, shared]

    def _loss(self, point: Tensor, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one network on one chunk, and how many of its samples are correct."""
        output = self._outputs(point, input)
        return self._loss_fn(output, target), (output.argmax(1) == target).sum()

    def _outputs(self, point: Tensor, input: Tensor) -> Tensor:
        output: Tensor = functional_call(self._model, self.named(point), (input,))
        return output

    def named(self, row: Tensor) -> Mapping[str, Tensor]:
        """A row (P,) as tensors by the names of the parameters: views of it."""
        parts: Sequence[Tensor] = row.split(self._sizes, dim=-1)
        shapes = self.layout.values()
        return {
            name: part.view(shape)
            for name, part, shape in zip(self.layout, parts, shapes, strict=True)
        }
