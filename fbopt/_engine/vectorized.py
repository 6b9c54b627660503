"""The gradients of K chunks at once, by ``torch.func.vmap``, and their addition to the sums.

g_1 ... g_K at theta, then g+_1 ... g+_K at theta + s_k g_k, each in one call of the model
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
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
        self._held: tuple[Any, ...] = ()
        self._known: dict[Hashable, tuple[ChunkFunction, dict[Hashable, Kind]]] = {}
        self._points: dict[int, StackedPerturbation] = {}
        self._weights: dict[tuple[float, ...], Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle nothing: every call can make it anew."""
        return Vectorized, ()

    def begin(self, work: ChunkGradient, compiled: bool, observed: bool) -> VectorizedGradient:
        """Return what works on groups of chunks in a call of the closure."""
        forward, recorded = work.forward, work.statistics.recorded
        held = work.sums.buckets, forward.model, forward.loss_fn, forward.evaluate
        if [*map(id, held)] != [*map(id, self._held)]:
            for kept in (self._known, self._points, self._weights):
                kept.clear()
            self._held = held
        modes = tuple(m.training for m in forward.model.modules())
        places = tuple((id(module), name) for module, name in recorded)
        settings = forward.autocast, forward.is_observed, work.is_exact, compiled, observed
        key = places, modes, *settings
        if key not in self._known:
            options = {"exact": work.is_exact, "shows": observed, "compiled": compiled}
            self._known[key] = ChunkFunction(forward, work.sums.params, recorded, **options), {}
        self._known[key][0].begin()
        for points in self._points.values():
            points.begin()
        return VectorizedGradient(work, self, *self._known[key])

    def points(self, sums: GradientSums, count: int) -> StackedPerturbation:
        """The buffer for `count` shifted points."""
        if count not in self._points:
            self._points[count] = StackedPerturbation(sums.buckets, count)
            self._points[count].begin()
        return self._points[count]

    def weights(self, values: Sequence[float], sums: GradientSums, device: torch.device) -> Tensor:
        """The weights of chunks as a tensor, made on the device; most groups have the same."""
        key = tuple(values)
        if len(self._weights) > 64:
            self._weights.clear()
        if key not in self._weights:
            self._weights[key] = torch.stack([sums.scalar(value, device) for value in key])
        return self._weights[key]


@dataclass(frozen=True)
class VectorizedGradient:
    """Works on groups of chunks: what :class:`ChunkGradient` does with one.

    Args:
        work: what is done with one chunk.
        kept: what calls share.
        function: the passes.
        kinds: what is known of groups, by their kind.
        probed: the kinds that were compared in this call.
    """

    work: ChunkGradient
    kept: Vectorized
    function: ChunkFunction
    kinds: dict[Hashable, Kind]
    probed: set[Hashable] = field(default_factory=set)

    def weights(self, group: Group) -> Tensor:
        """The weights of a group's chunks, (K,)."""
        return self.kept.weights(group.weights, self.work.sums, self.work.sums.params[0].device)

    def __call__(
        self,
        group: Group,
        stack: Stack,
        weights: Tensor,
        coefficient: Tensor | None,
        draws: GeneratorSnapshot,
        observe: Observe,
    ) -> tuple[Tensor, Tensor | None]:
        """Add a group's gradients; return its losses and ||g||^2 (None if not needed), (K,)."""
        draws.begin()
        if isinstance(draws, GeneratorSnapshot):
            passes = self._checked(group, stack, draws, observe is not None)
        else:  # in a capture, which reads nothing, of a kind that is known
            passes = self._first(stack)
        kind = self.kinds[group.kind]
        if observe is not None:
            evaluates = self.work.forward.evaluate is not None
            for shown in kind.shown_by(stack, passes, evaluates):
                observe(*shown)
        self._record(passes, weights)
        square = self._add(kind, stack, passes, weights, coefficient, draws)
        return passes.loss, square

    def _checked(
        self, group: Group, stack: Stack, draws: GeneratorSnapshot, observed: bool
    ) -> Passes:
        """The first passes, compared with those one by one in the first call."""
        work, probe = self.work, None
        fresh = work.means is not None or group.kind not in self.probed
        if group.kind not in self.kinds or (work.checks and fresh):
            probe = Probe(work, group, stack, draws, observed)
        with explained(work, group, stack, draws):
            passes = self._first(stack)
            if probe is not None:
                probe.compare(passes)
                self._check_draws(group, stack, passes, draws)
        if probe is not None:
            self.kinds[group.kind] = probe.kind
            self.probed.add(group.kind)
        return passes

    def _first(self, stack: Stack) -> Passes:
        theta = tuple(p.detach() for p in self.work.sums.params)
        return self.function.first(theta, self._buffers(stack.count), stack)

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
        kind: Kind,
        stack: Stack,
        passes: Passes,
        weights: Tensor,
        coefficient: Tensor | None,
        draws: GeneratorSnapshot,
    ) -> Tensor | None:
        work = self.work
        points = self.kept.points(work.sums, stack.count) if work.repetitions else None
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
                return self._at(points.points, stack).grads

            return addition.differences(passes.grads, weights, coefficient, work.penalty, shifted)

    def _at(self, points: Sequence[Tensor], stack: Stack) -> Passes:
        torch.clear_autocast_cache()
        return self.function.gradient(tuple(points), self._buffers(stack.count), stack)

    def _check_draws(
        self, group: Group, stack: Stack, passes: Passes, draws: GeneratorSnapshot
    ) -> None:
        """Compare the losses of both kinds of passes at theta, where they draw random numbers."""
        if not self.work.repetitions or not draws.has_moved():
            return
        points = self.kept.points(self.work.sums, stack.count).points
        for point, p in zip(points, self.work.sums.params, strict=True):
            point.copy_(p.detach())
        with draws.repeated() as rewind:
            rewind()
            again = self._at(points, stack)
        compare_draws(group, passes.loss, again.loss)
