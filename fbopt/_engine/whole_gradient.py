"""The gradient of all chunks at theta, for directions that have a share of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.snapshot import GeneratorSnapshot

if TYPE_CHECKING:
    from fbopt.closure import FullBatchClosure

# What a visit of all chunks depends on, and may be replaced between calls.
FOLLOWED = (
    *("model", "loss_fn", "chunks", "evaluate", "weight", "autocast", "on_pass_start"),
    *("cuda_graph", "backward", "vectorize", "compile"),
)


class WholeGradient:
    """The gradient G of all chunks, in memory of its own, which CUDA graphs may capture.

    Args:
        visitor: a closure without penalty, which visits the chunks.
        sums: of the closure that needs G.

    Attributes:
        visitor: as given.
        grads: G by the parameters, zeros for those that no chunk uses.
        parts: G as the kernels take it.
    """

    def __init__(self, visitor: FullBatchClosure, sums: GradientSums) -> None:
        self.visitor, self._buckets = visitor, sums.buckets
        self.grads = [torch.zeros_like(p, requires_grad=False) for p in sums.params]
        self.parts = self._buckets.gather(self.grads, "whole")

    @property
    def squared_norm(self) -> Tensor:
        """``||G||^2``, 0-dim, float64."""
        return self._buckets.squared_norm(self.parts)

    def fits(self, sums: GradientSums) -> bool:
        """Whether it was made for these parameters."""
        return self._buckets is sums.buckets

    def find(self, of: FullBatchClosure) -> None:
        """Visit all chunks of a closure; buffers and torch's generators are then as before."""
        for name in FOLLOWED:
            setattr(self.visitor, name, getattr(of, name))
        draws = GeneratorSnapshot(self._buckets.devices)
        draws.begin()
        try:
            self.visitor.accumulate()
        finally:
            draws.rewind()
        self.visitor.rollback()
        for mine, found in zip(self.grads, self.visitor.sums.means(), strict=True):
            mine.zero_() if found is None else mine.copy_(found)
        self.parts = self._buckets.gather(self.grads, "whole")
