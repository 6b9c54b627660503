"""The second points of K networks' chunks, by fbopt's one formula, for rows of parameters.

g ← g + k (∇L(θ + s g) − g)   or   g + k/2 (∇L(θ + s g) − ∇L(θ − s g)),   ‖s g‖ = r

with k = λ‖g‖/r for the penalty on ‖g‖², λ/r for that on ‖g‖, and the share of SAM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fbopt import GradientPenalty, SharpnessAware

Rule = GradientPenalty | SharpnessAware


class Perturbation(NamedTuple):
    """The rules of K networks at one step; those without one have λ = 0.

    Attributes:
        coefficient: λ, of SAM the share times r; float64 (K, 1).
        radius: r, float64 (K, 1).
        follows_norm: whether k grows with ‖g‖, bool (K, 1).
        is_central: whether differences are central, for all.
        active: for each network whether λ > 0.
    """

    coefficient: Tensor
    radius: Tensor
    follows_norm: Tensor
    is_central: bool
    active: list[bool]

    def add(self, grads: Tensor, norms: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradients (K, V, P) with the second points'.

        Args:
            grads: g.
            norms: ‖g‖, float64 (K, V).
            at: gradients (K, V, P) at the parameters plus s g, of s (K, V, 1).
        """
        is_zero, wide = norms == 0, torch.finfo(grads.dtype).max
        length = torch.where(is_zero, 0.0, self.radius / norms).clamp(-wide, wide)
        length = length.to(grads.dtype).unsqueeze(2)
        up, down = at(length), at(-length) if self.is_central else grads
        scale = self.coefficient / (self.radius * (2 if self.is_central else 1))
        k = scale * torch.where(self.follows_norm, norms, 1.0)
        k = torch.where(is_zero, 0.0, k).to(grads.dtype).unsqueeze(2)
        found = torch.addcmul(grads, k, up.sub_(down))
        # A network without a rule keeps its gradient where the other point has an infinite one.
        return found if all(self.active) else torch.where(k == 0, grads, found)


def perturbation(
    rules: Sequence[Rule | None], optimizers: Sequence[Optimizer], step: int, device: torch.device
) -> Perturbation | None:
    """The rules of all networks at their current learning rates; None where all have λ = 0."""
    found = [
        0.0 if rule is None else float(rule.coefficient_at(step, optimizer))
        for rule, optimizer in zip(rules, optimizers, strict=True)
    ]
    if not any(found):
        return None

    def column(values: Sequence[float | bool], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

    return Perturbation(
        column(found, torch.float64),
        column([1.0 if rule is None else rule.radius for rule in rules], torch.float64),
        column([rule is None or rule.direction.follows_norm for rule in rules], torch.bool),
        any(rule is not None and rule.method == "central" for rule in rules),
        [coefficient != 0 for coefficient in found],
    )
