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
from fbopt._engine.perturb import Norms, Perturbation, fill_
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

    Args:
        buckets: of the parameters.
        count: K.
        memory: where to put them, the `flats` of more points; none for memory of its own.
        theta: the gathered parameters.

    Attributes:
        flats: the memory of each bucket's points.
        points: for each parameter its copies (K, *shape).
        theta: what all perturbations start from.
    """

    def __init__(
        self, buckets: FlatBuckets, count: int, memory: Sequence[Tensor], theta: Parts
    ) -> None:
        self._buckets, self.theta = buckets, theta
        self.flats, self.points = buckets.stacked_buffers(count, memory)

    @torch.no_grad()
    def fill(
        self, grads: Parts, radius: float, eta: float | None = None, known: Norms | None = None
    ) -> Norms:
        """Write ``theta + radius T^2 g / ||T g||`` for each of K gradients; return the norms.

        See :meth:`Perturbation.fill`.
        """
        given = self.theta, grads, radius, eta, known
        return fill_(self._buckets, self.flats, *given, stacked=True)


class SharedPerturbation:
    """One shifted point for K chunks: the interface of :class:`StackedPerturbation`.

    Args:
        one: the buffer of the point.
        count: K.

    Attributes:
        point: the perturbed parameters.
        points: the same K times, (K, *shape), in the memory of one.
    """

    def __init__(self, one: Perturbation, count: int) -> None:
        self._one, self._count = one, count
        self.point = one.points
        self.points = [p.expand(count, *p.shape) for p in self.point]

    def fill(
        self, grads: Parts, radius: float, eta: float | None = None, known: Norms | None = None
    ) -> Norms:
        """Write ``theta + radius T^2 g / ||T g||``; return the norms for each of K chunks."""
        one = None if known is None else Norms(known.plain[0], known.scaled[0])
        found = self._one.fill(grads, radius, eta, one)
        return Norms(*(norm.expand(self._count).contiguous() for norm in found))


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


class StackedMemory:
    """Buffers for shifted points and for weights, kept from call to call."""

    def __init__(self) -> None:
        self._points: dict[int, StackedPerturbation] = {}
        self._weights: dict[tuple[float, ...], Tensor] = {}

    def clear(self) -> None:
        """Forget all: parameters have changed."""
        self._points.clear()
        self._weights.clear()

    @torch.no_grad()
    def begin(self, sums: GradientSums) -> None:
        """Read theta, which all perturbations start from until the next call."""
        if self._points:
            theta = _gathered(sums)
            for points in self._points.values():
                points.theta = theta

    @torch.no_grad()
    def points(self, sums: GradientSums, count: int) -> StackedPerturbation:
        """The buffer for `count` shifted points; the most points' serves for fewer, too."""
        if count not in self._points:
            most = self._points.get(max(self._points, default=0))
            memory = most.flats if most is not None and max(self._points) > count else ()
            if not memory and not sums.params[0].is_cuda:  # where no graph has captured the others
                self._points.clear()
            theta = _gathered(sums) if most is None else most.theta
            self._points[count] = StackedPerturbation(sums.buckets, count, memory, theta)
        return self._points[count]

    def weights(self, values: Sequence[float], sums: GradientSums, device: torch.device) -> Tensor:
        """The weights of chunks as a tensor, made on the device; most groups have the same."""
        key = tuple(values)
        if len(self._weights) > 64:
            self._weights.clear()
        if key not in self._weights:
            self._weights[key] = torch.stack([sums.scalar(value, device) for value in key])
        return self._weights[key]


def _gathered(sums: GradientSums) -> Parts:
    return sums.buckets.group([p.detach() for p in sums.params], "params")
