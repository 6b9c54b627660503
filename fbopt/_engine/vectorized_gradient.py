"""The gradients of K chunks at once, by ``torch.func.vmap``, and their addition to the sums.

g_1 ... g_K at theta, then g+_1 ... g+_K at theta + s_k g_k, each in one call of the model
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fbopt._engine.addition import GradientAddition, Gradients
from fbopt._engine.chunk import ChunkGradient, Observe
from fbopt._engine.chunk_groups import Group, Stack
from fbopt._engine.functional import ChunkFunction, Passes, Tensors
from fbopt._engine.shared_state import SharedState
from fbopt._engine.snapshot import GeneratorSnapshot
from fbopt._engine.stacked import (
    SharedPerturbation,
    StackedClip,
    StackedMemory,
    StackedPerturbation,
    StackedSums,
)
from fbopt._engine.vectorized_checks import Checks, check_draws, check_means, check_shifted
from fbopt._engine.vectorized_errors import explained
from fbopt._engine.vectorized_probe import Kind, Visit

COUNT = "num_batches_tracked"
# More than these are forgotten: chunks that hold numbers may always be new ones.
MOST_KINDS = 1024


@dataclass(frozen=True)
class Known:
    """Functions of passes, and what has been found of groups by kind and by what chunks share.

    `kinds` also tell which parameters were used: parts of a model may be switched on and off.
    """

    function: ChunkFunction
    kinds: dict[Hashable, dict[Hashable, Kind]] = field(default_factory=dict)
    compared: set[Hashable] = field(default_factory=set)

    def of(self, group: Hashable) -> dict[Hashable, Kind]:
        """What is known of groups that are alike."""
        if group not in self.kinds and len(self.kinds) >= MOST_KINDS:
            for kept in (self.kinds, self.compared, self.function.functions):
                kept.clear()
        return self.kinds.setdefault(group, {})


@dataclass(frozen=True)
class VectorizedGradient:
    """Works on groups of chunks: what :class:`ChunkGradient` does with one.

    Args:
        work: what is done with one chunk.
        memory: for points and weights.
        state: what chunks share.
        known: the passes, and what is known of groups.
    """

    work: ChunkGradient
    memory: StackedMemory
    state: SharedState
    known: Known

    @property
    def function(self) -> ChunkFunction:
        """The passes."""
        return self.known.function

    def weights(self, group: Group) -> Tensor:
        """The weights of a group's chunks, (K,)."""
        return self.memory.weights(group.weights, self.work.sums, self.work.sums.params[0].device)

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
        visit = Visit(group, stack, draws)
        kinds = self.known.of(visit.kind)
        if self.work.repetitions or not kinds:
            draws.begin()
        if visit.is_captured:  # of a kind that is known
            passes = self._first(visit)
        else:
            passes = self._checked(visit, observe is not None, kinds)
        kind = kinds[self._used(passes)]
        if observe is not None:
            evaluates = self.work.forward.evaluate is not None
            for shown in kind.shown_by(stack, passes, evaluates):
                observe(*shown)
        self._record(passes, weights)
        square = self._add(visit, kind, passes, weights, coefficient)
        return passes.loss, square

    def _checked(self, visit: Visit, observed: bool, kinds: dict[Hashable, Kind]) -> Passes:
        """The first passes, compared with those one by one where their kind is new."""
        work, checks = self.work, None
        if work.checks and work.means is not None:
            check_means(work, visit)
        if not kinds:
            checks = Checks(work, visit, self.state, observed)
            kind = checks.kind()
            checks.call(self.function, self._buffers(1))
        passes = self._first(visit)
        used = self._used(passes)
        if checks is None and used not in kinds:
            if not work.repetitions:
                visit.draws.begin()
            checks = Checks(work, visit, self.state, observed)
            kind = checks.kind()
        if checks is not None:
            checks.compare(passes)
            if len(kinds) >= MOST_KINDS:
                kinds.clear()
            kinds[used] = kind
        return passes

    def _used(self, passes: Passes) -> Hashable:
        """What tells which parameters were used: vmap repeats the zeros of others.

        A single chunk goes through the model at once only where that is compiled: the graph tells.
        """
        if len(passes.loss) > 1:
            return tuple(g.stride(0) == 0 for g in passes.grads)
        return self.function.ran

    def _explained(self, visit: Visit) -> contextlib.AbstractContextManager[None]:
        return explained(self.work, visit, self.state, self.function.compiled)

    def _first(self, visit: Visit) -> Passes:
        work, stack = self.work, visit.stack
        theta = tuple(p.detach() for p in work.sums.params)
        whole = tuple(work.whole.grads) if work.is_exact and work.whole is not None else ()
        with self._explained(visit):
            return self.function.first(theta, self._buffers(stack.count), stack, whole)

    def _buffers(self, count: int) -> Tensors:
        """For each chunk buffers to record its statistics in, zeros as before every pass."""
        found = []
        for module, name in self.work.statistics.recorded:
            buffer = getattr(module, name)
            stack = buffer.expand(count, *buffer.shape)
            found.append(stack.clone() if name == COUNT else torch.zeros_like(stack))
        return tuple(found)

    def _record(self, passes: Passes, weights: Tensor) -> None:
        recorded = zip(self.work.statistics.recorded, passes.recorded, strict=True)
        places = [(m._buffers[name], s) for (m, name), s in recorded]
        self.work.statistics.record_stacks({id(b): s for b, s in places}, weights)

    def _add(
        self,
        visit: Visit,
        kind: Kind,
        passes: Passes,
        weights: Tensor,
        coefficient: Tensor | None,
    ) -> Tensor | None:
        work, count = self.work, visit.stack.count
        points = self._points(count)
        clip = None if work.clip is None else StackedClip(work.clip)
        sums = StackedSums(work.sums, kind.seen)
        addition = GradientAddition(sums, clip, points, work.chunk_norms, work.whole_parts)
        if work.penalty is None:
            return addition.plain(passes.grads, weights)
        if work.is_exact:
            direction = work.penalty.direction
            return addition.exact(passes.grads, passes.products, weights, coefficient, direction)
        with visit.draws.repeated() as rewind:

            def shifted(again: bool) -> Gradients:
                rewind()
                return self._shifted(visit, points).grads

            return addition.differences(passes.grads, weights, coefficient, work.penalty, shifted)

    def _points(self, count: int) -> StackedPerturbation | SharedPerturbation | None:
        if not self.work.repetitions:
            return None
        if not self.work.penalty.direction.own:  # all chunks have one point
            return SharedPerturbation(self.work.perturbation, count)
        return self.memory.points(self.work.sums, count)

    def _shifted(self, visit: Visit, to: StackedPerturbation | SharedPerturbation) -> Passes:
        """The passes at K points, compared where their kind is new."""
        passes = self._at(to, visit)
        if visit.kind in self.known.compared or visit.is_captured:
            return passes
        other = check_shifted(self.work, visit, self.state, to.points, passes)
        if other and not isinstance(to, SharedPerturbation):
            both = lambda: self._first(visit), lambda: self._at(to, visit)
            check_draws(self.work, visit, to.points, *both)
        self.known.compared.add(visit.kind)
        return passes

    def _at(self, to: StackedPerturbation | SharedPerturbation, visit: Visit) -> Passes:
        torch.clear_autocast_cache()
        shared = isinstance(to, SharedPerturbation)
        points = tuple(to.point if shared else to.points)
        passes = self.function.first if shared else self.function.gradient
        with self._explained(visit):
            return passes(points, self._buffers(visit.stack.count), visit.stack)
