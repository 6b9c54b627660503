"""What a chunk adds to the sums: w g, or with second points w (g + k (g+ - g)), which for a penalty
is w (g + lambda H g); H g may also come from a second backward pass. Clipped where asked. The same
for stacks of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fbopt._direction import Direction, PerturbationRule
from fbopt._engine.chunk_clip import ChunkClip
from fbopt._engine.gradient_sums import GradientSums, Parts
from fbopt._engine.perturb import Perturbation
from fbopt._engine.stacked import (
    SharedPerturbation,
    StackedClip,
    StackedPerturbation,
    StackedSums,
)

Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class GradientAddition:
    """Adds gradients to sums.

    Args:
        sums: where.
        clip: None where chunks are not clipped.
        perturbation: for passes at second points.
        norms: whether ||g||^2 is wanted also where nothing else needs it.
        whole: the gradient of all chunks, gathered, where a direction has a share of it.
    """

    sums: GradientSums | StackedSums
    clip: ChunkClip | StackedClip | None
    perturbation: Perturbation | StackedPerturbation | SharedPerturbation | None
    norms: bool
    whole: Parts | None = None

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
        direction: Direction,
    ) -> Tensor:
        """Add ``w (g + lambda H v)`` from gradients and products H v; return ||g||^2."""
        parts = self.sums.gather([None if g is None else g.detach() for g in grads])
        square = self.sums.squared_norm(parts)
        # With g+ = H v, g- = 0 and a radius of 1/2 the kernel's central difference is H v times the
        # length that it is given.
        known = [None if g is None else h for g, h in zip(grads, products, strict=True)]
        plus = self.sums.gather(known, "plus")
        minus = [[torch.zeros_like(h) for h in part] for part in plus]
        length = direction.exact_length(square)
        self._add_penalised(parts, plus, minus, weight, coefficient, length, 0.5)
        return square

    def differences(
        self,
        grads: Gradients,
        weight: float | Tensor,
        coefficient: Tensor,
        rule: PerturbationRule,
        shifted: Callable[[bool], Gradients],
    ) -> Tensor:
        """Add ``w (g + k (g+ - g))``, or by central differences; return ||g||^2.

        Args:
            grads: g, at theta.
            weight: w.
            coefficient: c, of which k is made: lambda, of a penalty.
            rule: which differences, in which direction and how far.
            shifted: returns the gradient at the point that the perturbation holds; called with
                True for the second one of central differences.
        """
        radius, direction, gather = rule.radius, rule.direction, self.sums.gather
        parts, minus = gather(grads), list[list[Tensor]]()
        along = self._along(parts, direction)
        norms = self.perturbation.fill(along, radius, direction.eta)
        plus = gather(shifted(False), "plus")
        if rule.method == "central":
            self.perturbation.fill(along, -radius, direction.eta, norms)
            minus = gather(shifted(True), "minus")
        length = direction.length(norms.plain)
        self._add_penalised(parts, plus, minus, weight, coefficient, length, radius)
        return norms.plain if along is parts else self.sums.squared_norm(parts)

    def _along(self, grads: Parts, direction: Direction) -> Parts:
        """The direction v."""
        if not direction.whole:
            return grads
        if not direction.own:
            return self.whole
        return [
            list(torch._foreach_add(part, shared, alpha=direction.whole))
            for part, shared in zip(grads, self.whole, strict=True)
        ]

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
