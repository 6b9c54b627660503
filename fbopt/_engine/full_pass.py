"""The visit of all chunks: sums of w_c g_c, w_c L_c and w_c ||g_c||^2, once more where the units of
exact sums did not fit, and their means over all processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbopt._engine.batchnorm import RunningStatistics
from fbopt._engine.chunk import ChunkGradient, Observe
from fbopt._engine.chunk_groups import Group, Stack, Weighed, grouped
from fbopt._engine.forward import ChunkLoss, autocast_suspended
from fbopt._engine.gradient_sums import MOST_PASSES, GradientSums
from fbopt._engine.known_groups import KnownGroups
from fbopt._engine.observation import InOrder, ignore
from fbopt._engine.other_means import SampleMeans
from fbopt._engine.preparation import Preparation
from fbopt._engine.reduce import Means, Reduction
from fbopt._engine.snapshot import BufferSnapshot, GeneratorSnapshot
from fbopt._engine.vectorized import Vectorized
from fbopt._engine.vectorized_gradient import VectorizedGradient
from fbopt._engine.weights import Mean, TargetCounts, mean_of, weigh
from fbopt._engine.whole_gradient import WholeGradient
from fbopt._sharding import working_device

if TYPE_CHECKING:
    from fbopt.closure import FullBatchClosure

Losses = tuple[Tensor, Tensor | None]


class FullPass:
    """Visits all chunks of a closure, whose attributes may change between calls.

    Args:
        sums, statistics, reduction: the closure's.
        prepared: begun anew for every call.
    """

    def __init__(
        self,
        sums: GradientSums,
        statistics: RunningStatistics,
        reduction: Reduction,
        prepared: Preparation,
    ) -> None:
        self._sums, self._statistics, self._reduction = sums, statistics, reduction
        self._prepared = prepared
        self._counts = TargetCounts()
        self._vectorized, self._known_groups = Vectorized(), KnownGroups()
        self._checked: tuple[Any, ...] = ()  # for what autograd graphs were checked
        self._whole_gradient: WholeGradient | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Check again after pickling: other chunks may have been checked than are pickled."""
        return vars(self) | {"_checked": (), "_whole_gradient": None}

    def __call__(
        self,
        closure: FullBatchClosure,
        coefficient: float | Tensor | None,
        whole_gradient: WholeGradient | None = None,
    ) -> Means:
        """Return the means of losses and of gradient norms, None where these are not needed.

        Args:
            closure: what to do.
            coefficient: lambda; None for no penalty.
            whole_gradient: where the penalty's direction has a share of it.

        Raises:
            RuntimeError: the units of exact sums never fit.
        """
        self._whole_gradient = whole_gradient
        whole = coefficient is not None or closure.chunk_norms or closure.chunk_max_norm is not None
        start = None
        if self._sums.accumulation == "exact":
            start = self._generators()
            start.begin()  # which a CUDA graph of the whole step does not allow
        with autocast_suspended(working_device(self._sums.params[0])) as outer:
            for attempt in range(MOST_PASSES):
                if attempt:
                    self._prepared.before.restore()
                    self._sums.reset()
                    start.rewind()
                with torch.no_grad(), self._statistics.averaging():
                    with self._reduction.visiting(apart=not whole):
                        self._visit(closure, coefficient, attempt, closure.autocast or outer)
                    found = self._reduction.combine()
                if found is not None:
                    return found if whole else Means(found.loss)
        raise RuntimeError(
            f'accumulation="exact" visited all chunks {MOST_PASSES} times, and the gradients '
            "changed in size each time: make chunks, model and loss give the same values in every "
            "pass (draws from torch's generators are repeated, others are not), or pass "
            'accumulation="float32"'
        )

    def _visit(
        self,
        closure: FullBatchClosure,
        coefficient: float | Tensor | None,
        attempt: int,
        autocast: torch.dtype | None,
    ) -> None:
        """Add up this process's chunks."""
        at_once = closure.vectorize > 1 or closure.compile
        if at_once and closure.on_pass_start is not None:  # before groups are looked for
            closure.on_pass_start()
        # Without on_pass_start an observer has counted these chunks already.
        is_again = attempt and closure.observe is not None and closure.on_pass_start is None
        observe = ignore if is_again else closure.observe
        penalty = None if coefficient is None else closure.penalty
        known = self._sums.buckets, penalty, closure.evaluate or closure.loss_fn, closure.chunks
        checks = [*map(id, known)] != [*map(id, self._checked)]
        if checks:
            self._checked = ()  # frees chunks of an earlier call
        mean = mean_of(closure.loss_fn)
        work = self._work(closure, penalty, autocast, checks, mean)
        device = self._sums.buckets.device(0)
        scale = None if coefficient is None else self._sums.scalar(coefficient, device)
        weighed = self._weighed(closure, mean, starts=not at_once)
        chunks = self._reduction.lockstep(weighed, closure.chunks)
        if at_once:
            self._visit_groups(closure, self._groups(closure, chunks, mean), work, scale, observe)
        else:
            visit = self._visitor(work, False, scale, observe)
            for index, chunk, weight in chunks:
                loss, square = visit(work, index, chunk, weight)
                self._reduction.add(loss, square, weight)
        self._checked = known

    def _visitor(
        self, work: ChunkGradient, compiled: bool, scale: Tensor | None, observe: Observe
    ) -> Callable[..., Losses]:
        """What does the work on a chunk or a group, by graphs where there are any."""
        draws, graphs = self._generators(), self._prepared.graphs
        if graphs is None:
            return lambda work, *given: work(*given, scale, draws, observe)
        graphs.begin(work, scale, observe, compiled)
        return functools.partial(graphs.visit, draws)

    def _groups(
        self, closure: FullBatchClosure, chunks: Iterable[Weighed], mean: Mean | None
    ) -> Iterable[tuple[Group, Stack]]:
        """The groups of all chunks with their stacks, those of the last call if they still fit."""
        size = closure.vectorize
        watched = self._vectorized.is_new(closure.chunks, size)
        if closure.weight is not None:
            self._known_groups.forget()
            return ((group, group.stack()) for group in grouped(chunks, size, watched))
        of = closure.chunks, size, mean
        known = self._known_groups.find(*of)
        return (
            self._known_groups.keep(grouped(chunks, size, watched), *of) if known is None else known
        )

    def _visit_groups(
        self,
        closure: FullBatchClosure,
        groups: Iterable[tuple[Group, Stack]],
        work: ChunkGradient,
        scale: Tensor | None,
        observe: Observe,
    ) -> None:
        """Add up groups of chunks, those of a kind at once."""
        ordered = None if observe is None else InOrder(observe, closure.vectorize)
        visit = self._visitor(work, closure.compile, scale, ordered)
        is_list = type(closure.chunks) in (list, tuple)
        alone = is_list and closure.weight is None and observe is None
        together = self._vectorized.begin(work, closure.compile, observe is not None, alone)
        try:
            for group, stack in groups:
                if ordered is not None:
                    ordered.begin(group.indices)
                self._visit_group(group, stack, work, together, visit)
            if ordered is not None:
                ordered.end()
        finally:
            together.state.drop_leftovers()
        self._vectorized.watched = closure.chunks, closure.vectorize

    def _visit_group(
        self,
        group: Group,
        stack: Stack,
        work: ChunkGradient,
        together: VectorizedGradient,
        visit: Callable[..., Losses],
    ) -> None:
        if len(group) == 1 and not together.function.compiled:
            ((index, chunk, weight),) = group.members
            loss, square = visit(work, index, chunk, weight)
            self._reduction.add(loss, square, weight)
            return
        losses, squares = visit(together, group, stack, together.weights(group))
        each = [None] * len(group) if squares is None else squares.unbind()
        for loss, square, weight in zip(losses.unbind(), each, group.weights, strict=True):
            self._reduction.add(loss, square, weight)

    def _work(
        self,
        closure: FullBatchClosure,
        penalty: Any,
        autocast: torch.dtype | None,
        checks: bool,
        mean: Mean | None,
    ) -> ChunkGradient:
        """What is done with each chunk."""
        by_samples = closure.weight is None and mean is None
        return ChunkGradient(
            self._forward(closure, autocast),
            penalty,
            self._sums,
            self._statistics,
            self._prepared.between,
            self._prepared.perturbation,
            self._prepared.clip,
            closure.chunk_norms,
            closure.backward,
            self._reduction.sharded or None,
            self._reduction.lockstep,
            checks,
            SampleMeans(self._reduction.collectives.is_single) if by_samples else None,
            self._whole_gradient,
        )

    def _forward(self, closure: FullBatchClosure, autocast: torch.dtype | None) -> ChunkLoss:
        device, watched = working_device(self._sums.params[0]), closure.observe is not None
        return ChunkLoss(
            closure.model, closure.loss_fn, closure.evaluate, autocast, device, watched
        )

    def loss_only(self, closure: FullBatchClosure) -> Tensor:
        """Return the mean loss; buffers and torch's generators are then as before."""
        buffers, draws = BufferSnapshot(closure.model), self._generators()
        buffers.save()
        draws.begin()
        try:
            with autocast_suspended(working_device(self._sums.params[0])) as outer:
                forward = self._forward(closure, closure.autocast or outer)
                chunks = self._weighed(closure, mean_of(closure.loss_fn), starts=True)
                # With autograd graphs, as a loss may differentiate by its input.
                return self._reduction.mean_loss(
                    (forward.differentiable(index, chunk)[0].detach(), weight)
                    for index, chunk, weight in chunks
                )
        finally:
            buffers.restore()
            draws.rewind()

    def _generators(self) -> GeneratorSnapshot:
        return GeneratorSnapshot(self._sums.buckets.devices)

    def _weighed(
        self, closure: FullBatchClosure, known: Mean | None, starts: bool
    ) -> Iterator[tuple[int, Any, float]]:
        if starts and closure.on_pass_start is not None:  # an error here reaches other processes
            closure.on_pass_start()
        self._counts.follow(closure.chunks)
        weighed = (
            (index, chunk, self._weigh(index, chunk, closure.weight, known))
            for index, chunk in enumerate(closure.chunks)
        )
        # Those of a list in a row, not between passes: that takes a fraction of the time.
        at_once = closure.weight is None and type(closure.chunks) in (list, tuple)
        yield from list(weighed) if at_once else weighed

    def _weigh(self, index: int, chunk: Any, own: Any, known: Mean | None) -> float:
        weight = weigh(index, chunk, own, known, self._counts)
        self._sums.store.check_weight(weight)
        return weight
