"""What a chunk adds to the sums: w g, or with a penalty w (g + lambda H g), with H g by finite
differences or from a second backward pass; clipped where asked. The same for stacks of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fbopt._engine.chunk_clip import ChunkClip
from fbopt._engine.gradient_sums import GradientSums, Parts
from fbopt._engine.perturb import Perturbation
from fbopt._engine.stacked import StackedClip, StackedPerturbation, StackedSums
from fbopt.penalty import GradientPenalty

Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class GradientAddition:
    """Adds gradients to sums.

    Args:
        sums: where.
        clip: None where chunks are not clipped.
        perturbation: for a penalty by finite differences.
        norms: whether ||g||^2 is wanted also where nothing else needs it.
    """

    sums: GradientSums | StackedSums
    clip: ChunkClip | StackedClip | None
    perturbation: Perturbation | StackedPerturbation | None
    norms: bool

    def plain(self, grads: Gradients, weight: float | Tensor) -> Tensor | None:
        """Add ``w g``; return ||g||^2 where it is wanted."""
        parts = self.sums.gather(grads)
        square = None
        if self.norms or self.clip is not None:
            square = self.sums.squared_norm(parts)
        if self.clip is not None:
            weight = self.clip.weight(weight, square)
        self.sums.add(parts, weight)
        return square

    def exact(
        self,
        grads: Gradients,
        products: Gradients,
        weight: float | Tensor,
        coefficient: Tensor,
    ) -> Tensor:
        """Add ``w (g + lambda H g)`` from gradients and products H g; return ||g||^2."""
        parts = self.sums.gather([None if g is None else g.detach() for g in grads])
        square = self.sums.squared_norm(parts)
        # With g+ = H g, g- = 0 and ||g|| / (2 radius) = 1 the kernel's central difference is H g.
        known = [None if g is None else h for g, h in zip(grads, products, strict=True)]
        plus = self.sums.gather(known, "plus")
        minus = [[torch.zeros_like(h) for h in part] for part in plus]
        self._add_penalised(parts, plus, minus, weight, coefficient, torch.ones_like(square), 0.5)
        return square

    def differences(
        self,
        grads: Gradients,
        weight: float | Tensor,
        coefficient: Tensor,
        penalty: GradientPenalty,
        shifted: Callable[[bool], Gradients],
    ) -> Tensor:
        """Add ``w (g + lambda H g)`` by finite differences; return ||g||^2.

        Args:
            grads: g, at theta.
            weight: w.
            coefficient: lambda.
            penalty: which differences, and how far.
            shifted: returns the gradient at the point that the perturbation holds; called with
                True for the second one of central differences.
        """
        radius, gather = penalty.radius, self.sums.gather
        parts, minus = gather(grads), list[list[Tensor]]()
        square = self.perturbation.fill(parts, radius)
        plus = gather(shifted(False), "plus")
        if penalty.method == "central":
            self.perturbation.fill(parts, -radius, square)
            minus = gather(shifted(True), "minus")
        self._add_penalised(parts, plus, minus, weight, coefficient, square, radius)
        return square

    def _add_penalised(
        self,
        grads: Parts,
        plus: Parts,
        minus: Parts,
        weight: float | Tensor,
        coefficient: Tensor,
        squared_norm: Tensor,
        radius: float,
    ) -> None:
        where = self.clip or self.sums
        where.add_penalised(grads, plus, minus, weight, coefficient, squared_norm, radius)
