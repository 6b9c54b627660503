"""A moving average of a model's weights, to be evaluated in its place.

θ̄ ← m θ̄ + (1 − m) θ after every pass, buffers of floating point too; the others are copied.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """The average, from the model as it is now on; `keep` is m, `model` what to evaluate."""

    def __init__(self, model: nn.Module, keep: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.keep = keep

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Bring in the model as it is after a pass."""
        for mean, now in zip(_tensors(self.model), _tensors(model), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, 1 - self.keep)
            else:
                mean.copy_(now)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
