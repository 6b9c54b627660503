"""The gradients of K chunks at once, by ``torch.func.vmap``, and their addition to the sums.

g_1 ... g_K at theta, then g+_1 ... g+_K at theta + s_k g_k, each in one call of the model
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbopt._engine.addition import GradientAddition, Gradients
from fbopt._engine.chunk import ChunkGradient, Observe
from fbopt._engine.chunk_groups import Group, Stack
from fbopt._engine.functional import ChunkFunction, Passes, Place, Tensors
from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.snapshot import GeneratorSnapshot
from fbopt._engine.stacked import StackedClip, StackedPerturbation, StackedSums
from fbopt._engine.vectorized_probe import Kind, Probe, compare_draws, explained

COUNT = "num_batches_tracked"


class Vectorized:
    """What groups of chunks need from call to call: functions, their kinds, buffers for points."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._function: ChunkFunction | None = None
        self._points: dict[int, StackedPerturbation] = {}
        self._weights: dict[tuple[float, ...], Tensor] = {}
        self.kinds: dict[Hashable, Kind] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle nothing: every call can make it anew."""
        return Vectorized, ()

    def begin(self, work: ChunkGradient, compiled: bool, observed: bool) -> VectorizedGradient:
        """Return what works on groups of chunks in a call of the closure."""
        forward = work.forward
        recorded = work.statistics.recorded
        modes = tuple(m.training for m in forward.model.modules())
        held = [*(id(x) for x in (work.sums.buckets, forward.model)), *map(_identity, recorded)]
        losses = forward.loss_fn, forward.evaluate, forward.autocast, forward.is_observed
        key = *held, losses, modes, work.is_exact, compiled, observed
        if key != self._key or self._function is None:
            if self._key[: len(held)] != tuple(held):
                self._points.clear()
                self._weights.clear()
            self.kinds.clear()
            self._function = ChunkFunction(
                forward,
                work.sums.params,
                recorded,
                exact=work.is_exact,
                shows=observed,
                compiled=compiled,
            )
            self._key = key
        if work.checks:
            self.kinds.clear()
        for points in self._points.values():
            points.begin()
        return VectorizedGradient(work, self._function, self)

    def points(self, sums: GradientSums, count: int) -> StackedPerturbation:
        """The buffer for `count` shifted points."""
        if count not in self._points:
            self._points[count] = StackedPerturbation(sums.buckets, count)
            self._points[count].begin()
        return self._points[count]

    def weights(self, values: Sequence[float], device: torch.device) -> Tensor:
        """The weights of chunks as a tensor; most groups have the same."""
        key = tuple(values)
        if len(self._weights) > 64:
            self._weights.clear()
        if key not in self._weights:
            self._weights[key] = torch.tensor(key, dtype=torch.float64, device=device)
        return self._weights[key]


def _identity(place: Place) -> tuple[int, str]:
    return id(place[0]), place[1]


@dataclass(frozen=True)
class VectorizedGradient:
    """Works on groups of chunks: what :class:`ChunkGradient` does with one."""

    work: ChunkGradient
    function: ChunkFunction
    kept: Vectorized

    def __call__(
        self, group: Group, coefficient: Tensor | None, draws: GeneratorSnapshot, observe: Observe
    ) -> tuple[Tensor, Tensor | None]:
        """Add a group's gradients; return its losses and ||g||^2 (None if not needed), (K,)."""
        work, count = self.work, len(group)
        kind, probe = self.kept.kinds.get(group.kind), None
        if kind is None or (work.checks and work.means is not None):
            probe = Probe(work, group, draws, observe is not None)
            kind = self.kept.kinds[group.kind] = probe.kind
        stack, weights = group.stack(), self.kept.weights(group.weights, self._device)
        draws.begin()
        with explained(work, group, draws):
            passes = self._first(stack, count)
            if probe is not None:
                probe.compare(passes)
                self._check_draws(group, stack, passes, draws)
        if observe is not None:
            evaluates = work.forward.evaluate is not None
            for shown in kind.shown_by(group, passes, evaluates):
                observe(*shown)
        self._record(passes, weights)
        square = self._add(group, kind, stack, passes, weights, coefficient, draws)
        return passes.loss, square

    @property
    def _device(self) -> torch.device:
        return self.work.sums.params[0].device

    def _first(self, stack: Stack, count: int) -> Passes:
        theta = tuple(p.detach() for p in self.work.sums.params)
        return self.function.first(theta, self._buffers(count), stack, count)

    def _buffers(self, count: int) -> Tensors:
        """For each chunk buffers to record its statistics in, zeros as before every pass."""
        found = []
        for module, name in self.work.statistics.recorded:
            buffer = getattr(module, name)
            stack = buffer.expand(count, *buffer.shape)
            found.append(stack.clone() if name == COUNT else torch.zeros_like(stack))
        return tuple(found)

    def _record(self, passes: Passes, weights: Tensor) -> None:
        places = [(m._buffers[name], s) for (m, name), s in self._recorded(passes)]
        self.work.statistics.record_stacks({id(b): s for b, s in places}, weights)

    def _recorded(self, passes: Passes) -> Iterator[tuple[Place, Tensor]]:
        return zip(self.work.statistics.recorded, passes.recorded, strict=True)

    def _add(
        self,
        group: Group,
        kind: Kind,
        stack: Stack,
        passes: Passes,
        weights: Tensor,
        coefficient: Tensor | None,
        draws: GeneratorSnapshot,
    ) -> Tensor | None:
        work, count = self.work, len(group)
        points = self.kept.points(work.sums, count) if work.repetitions else None
        clip = None if work.clip is None else StackedClip(work.clip)
        sums = StackedSums(work.sums, kind.seen)
        addition = GradientAddition(sums, clip, points, work.chunk_norms)
        if work.penalty is None:
            return addition.plain(passes.grads, weights)
        if work.is_exact:
            return addition.exact(passes.grads, passes.products, weights, coefficient)
        with draws.repeated() as rewind:

            def shifted(again: bool) -> Gradients:
                rewind()
                return self._at(points.points, stack, count).grads

            return addition.differences(passes.grads, weights, coefficient, work.penalty, shifted)

    def _at(self, points: Sequence[Tensor], stack: Stack, count: int) -> Passes:
        torch.clear_autocast_cache()
        return self.function.gradient(tuple(points), self._buffers(count), stack, count)

    def _check_draws(
        self, group: Group, stack: Stack, passes: Passes, draws: GeneratorSnapshot
    ) -> None:
        """Compare the losses of both kinds of passes at theta, where they draw random numbers."""
        if not self.work.repetitions or not draws.has_moved():
            return
        theta = [p.detach().expand(len(group), *p.shape) for p in self.work.sums.params]
        with draws.repeated() as rewind:
            rewind()
            again = self._at(theta, stack, len(group))
        compare_draws(group, passes.loss, again.loss)
