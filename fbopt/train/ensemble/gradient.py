"""The gradients of V chunks at the points of K networks, by one pass over all of them.

L_kc(θ_k) summed over networks k and chunks c has the gradient ∇L_kc(θ_k) in the row of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fbopt.train.ensemble.outputs import StackedModel
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
        correct: int64 (K, V), the samples that were classified correctly; None if not asked for.
    """

    grads: Tensor
    losses: Tensor
    correct: Tensor | None


class StackedGradient:
    """Gradients of networks that differ in their parameters alone.

    Args:
        model: the architecture, without buffers.
        sample_losses: of logits (B, classes, n) and labels (B, n): (B, n).
        compiled: whether torch.compile makes the passes; once for each shape.

    Attributes:
        model: the stacked networks.
    """

    def __init__(self, model: nn.Module, sample_losses: Loss, compiled: bool = False) -> None:
        self.model, self._sample_losses = StackedModel(model), sample_losses
        self._function = self._losses
        if compiled:
            self._function = torch.compile(self._losses, fullgraph=True, dynamic=False)

    def __call__(self, points: Tensor, chunks: Stack, counts: bool = True) -> Pass:
        """The gradients at points (K, P), one for all of a network's chunks, or (K, V, P).

        With `counts` the correct samples, too.
        """
        networks, count = len(points), chunks.target.shape[0 if chunks.shared else 1]
        points = points.detach()
        if points.dim() == 2:
            points = points.unsqueeze(1).expand(-1, count, -1)
        leaf = points.reshape(networks * count, -1).detach().requires_grad_()
        input, target, shared = _rows(chunks, networks)
        with torch.enable_grad():
            losses, correct = self._function(leaf, input, target, shared, counts)
            (grads,) = torch.autograd.grad(losses.sum(), leaf)
        shape = networks, count
        return Pass(
            grads.view(*shape, -1),
            losses.detach().view(shape),
            None if correct is None else correct.view(shape),
        )

    def _losses(
        self, rows: Tensor, input: Tensor, target: Tensor, shared: bool, counts: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The loss in every row, and how many of its samples are correct."""
        output = self.model(rows, input, shared)
        target = target.expand(len(rows), -1) if shared else target
        losses = self._sample_losses(output, target).mean(1)
        if not counts:
            return losses, None
        # Of numbers that lie side by side the largest is found several times as fast.
        largest = output.detach().mT.contiguous().argmax(2)
        return losses, (largest == target).sum(1)


def _rows(chunks: Stack, networks: int) -> tuple[Tensor, Tensor, bool]:
    """The samples of each network and chunk, (K V, n, …); or (n, …) of one chunk that all share."""
    if not chunks.shared:
        return chunks.input.flatten(0, 1), chunks.target.flatten(0, 1), False
    if len(chunks.target) == 1:
        return chunks.input[0], chunks.target[0], True
    repeated = [t.expand(networks, *t.shape).flatten(0, 1) for t in chunks[:2]]
    return repeated[0], repeated[1], False
