"""Sums, perturbation and clip for stacks: the gradients of K chunks with a leading dimension K.
Parameters and sums are read once for K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._engine.chunk_clip import ChunkClip
from fbopt._engine.gradient_sums import GradientSums, Parts
from fbopt._engine.perturb import shift_
from fbopt._ops.buckets import FlatBuckets


class StackedSums:
    """The interface of :class:`GradientSums` for K gradients at once, which go to its sums.

    Args:
        sums: where gradients are added.
        seen: the indices of the parameters that get a gradient.
    """

    def __init__(self, sums: GradientSums, seen: frozenset[int]) -> None:
        self._sums, self._seen = sums, seen
        self.add, self.add_penalised = sums.add, sums.add_penalised

    def gather(self, grads: Sequence[Tensor], slot: str = "grads") -> Parts:
        """Return stacks as the kernels take them; note which parameters have a gradient."""
        self._sums.unseen.difference_update(self._seen)
        return self._sums.buckets.gather_stacks(grads)

    def squared_norm(self, parts: Parts) -> Tensor:
        """Return ``||g||^2`` of gathered gradients: (K,), float64."""
        return self._sums.buckets.squared_norm(parts, stacked=True)


class StackedPerturbation:
    """K shifted points in a second buffer: the parameters with a leading dimension K.

    Attributes:
        points: for each parameter its copies (K, *shape).
    """

    def __init__(self, buckets: FlatBuckets, count: int) -> None:
        self._buckets = buckets
        self._flats, self.points = buckets.stacked_buffers(count)

    @torch.no_grad()
    def begin(self) -> None:
        """Read theta, which all perturbations start from until the next call."""
        self._theta = self._buckets.group([p.detach() for p in self._buckets.params], "params")

    @torch.no_grad()
    def fill(self, grads: Parts, radius: float, squared_norm: Tensor | None = None) -> Tensor:
        """Write ``theta + radius g / ||g||`` for each of K gradients; return ``||g||^2`` (K,)."""
        if squared_norm is None and len(grads) > 1:
            squared_norm = self._buckets.squared_norm(grads, stacked=True)
        return shift_(self._flats, self._theta, grads, radius, squared_norm)


class StackedClip:
    """Clips each of K gradients: the interface of :class:`ChunkClip`."""

    def __init__(self, clip: ChunkClip) -> None:
        self._clip, self.weight = clip, clip.weight

    def add_penalised(
        self,
        grads: Parts,
        plus: Parts,
        minus: Parts,
        weight: Tensor,
        coefficient: Tensor,
        squared_norm: Tensor,
        radius: float,
    ) -> None:
        """See :meth:`GradientSums.add_penalised`. One after the other: the clip needs the norm."""
        for k in range(len(weight)):
            one: list[Any] = [
                [[x[k] for x in part] for part in parts] for parts in (grads, plus, minus)
            ]
            self._clip.add_penalised(*one, weight[k], coefficient, squared_norm[k], radius)
